"""HEAPr: what the loss feels of a neuron, to the second order, in the expert's output."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.methods.trimmers import NeuronsSeen, Trimmer

METHOD = {
    "paper": 204,
    "title": "HEAPr: Hessian-based Efficient Atomic Expert Pruning in Output Space",
    "tags": ["reads:gradients"],
}


@final
class Heapr(Trimmer):
    """Drop the neurons (atomic experts) that the loss would feel least: width pruning by second derivatives.

    An expert's output is a sum over its neurons k of their activation h_k times a column w_k of the down
    projection. Without neuron k the output moves by -h_k w_k, and the loss by half of the quadratic form of
    the Hessian in it, which is taken to be the mean product of gradients (Fisher information): half of
    E[h_k^2] times w_k' E[g g'] w_k, with g the gradient of the loss by the expert's output. As
    w_k' E[g g'] w_k is the mean square of g' w_k, no matrix of the model's width squared is ever made.

    Shapes:
        ``squares [F]`` and ``pulls [F]`` to scores ``[F]``.


    Example:
        >>> import torch
        >>> seen = NeuronsSeen(torch.tensor([1.0, 4.0]), torch.eye(2), torch.tensor([2.0, 0.25]))
        >>> Heapr().scores(seen).tolist()
        [1.0, 0.5]

    Differences from the paper:
        Each expert keeps the same number of neurons, so that the result is an ordinary checkpoint; the paper
        ranks the neurons of all layers together and leaves experts of unequal widths, which no reader of
        ordinary checkpoints has a place for. One pass forwards and backwards instead of two passes forwards
        and one backwards. An expert that no token reached is scored by its columns' lengths; its code drops
        all of such an expert first. Calibration text is the user's or mixtura's own, by default 16,384 of
        its tokens; the paper takes 128 sequences of WikiText-2.

    Reference:
        HEAPr: Hessian-based Efficient Atomic Expert Pruning in Output Space (Li, Yang, Zhou, Xue, Jiang and
        Wang, 2025, arXiv 2509.22299; paper 204). How its code treats experts that were not reached is known
        from a description, not read.
    """

    def scores(self, seen: NeuronsSeen) -> Float[Tensor, " F"]:
        assert seen.pulls is not None, "the core gives gradients to whoever carries the tag"
        return 0.5 * seen.squares.float() * seen.pulls.float()
