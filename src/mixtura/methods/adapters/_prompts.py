"""Decisions that are made once for a sequence, by its prompt, and shared by the sites of a model."""

from __future__ import annotations

from abc import ABC
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import mean_of_valid
from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._shared import LoraExperts, site_seed
from mixtura.types import Change, RouterInput, Site


def prompt_of(inputs: RouterInput) -> Bool[Tensor, " T"]:
    """The tokens that decide: those before all that labels ask for, or all where there are no labels."""
    told = inputs.labels.get("prompt")
    return inputs.valid if told is None else inputs.valid & (told != 0)


def prompt_means(inputs: RouterInput, values: Float[Tensor, "T C"]) -> Float[Tensor, "S C"]:
    """The mean of each sequence's values over its prompt; what it was where the prompt came in a pass before.

    A sequence without any token that counts has zeros.
    """
    known = inputs.history.get("prompt")
    if known is not None:
        return known.to(values.device)
    ids, counted = inputs.sequences, prompt_of(inputs)
    count = int(ids.max()) + 1 if len(ids) else 0
    sums = values.new_zeros(count, values.shape[1]).index_add(0, ids[counted], values[counted])
    numbers = torch.bincount(ids[counted], minlength=count)
    return sums / numbers.clamp(min=1).to(sums)[:, None]


class Joined(Adapter, ABC):
    """An adapter whose sites share parameters, which lie at the first of them."""

    def join(self, first: Adapter) -> None:
        # In a tuple, so that the parameters are not also this module's.
        self._first = (first,)

    @property
    def first(self) -> Adapter:
        """The site where what is shared lies."""
        found: tuple[Adapter, ...] = getattr(self, "_first", (self,))
        return found[0]


class PromptExperts(LoraExperts, Joined, ABC):
    """LoRA experts in all of a model's linear layers, of which a sequence gets one, by its prompt.

    A router reads the mean of the prompt at the first site that asks, and nothing that it reads is learned
    through it. It is trained with the experts by gradients that go past the choice, or, while what is learned
    is all of one ``task``, by that.

    Attributes:
        with_base: whether one of the choices is the base alone.
        task: the expert that all that is learned belongs to, -1 for the base; None where the router decides.
        guidance: coefficient of the cross-entropy with the task.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        num_experts: int,
        task: int | None,
        guidance: float,
        hidden: int,
        with_base: bool,
        first_layer: int,
        seed: int,
    ) -> None:
        here = site.layer >= first_layer
        super().__init__(
            site,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            num_experts=num_experts,
            balance=0.0,
            seed=seed,
            made=here,
        )
        self.with_base, self.task = with_base, task
        if not here:
            self.idle = f"what it changes begins in layer {first_layer} of layers 0 to {site.num_layers - 1}"
        if task is not None:
            self.within("task", task, -1 if with_base else 0, num_experts - 1)
        self.guidance = self.within("guidance", guidance, 0, 1e6)
        if site.place == 0:
            cols, choices = site.matrices["weight"].cols, num_experts + with_base
            sizes = [cols, hidden, choices] if hidden else [cols, choices]
            self.layers = nn.ParameterList(
                drawn(site_seed(site, seed, f"router {place}"), wide, narrow)
                for place, (narrow, wide) in enumerate(pairwise(sizes))
            )

    def change(self, inputs: RouterInput) -> Change:
        if not hasattr(self, "a"):
            return Change(matrices={})
        if inputs.state is None:
            means = prompt_means(inputs, exact(inputs.x.detach()))
            state, history = means[inputs.sequences], {"prompt": means}
        else:
            state, history = inputs.state, {}
        logits = self.logits(state)
        shares, losses = self.choice(logits, inputs)
        part = self.mixed(shares[:, int(self.with_base) :], losses)
        return Change(matrices=part.matrices, shares=part.shares, losses=losses, state=state, history=history)

    def logits(self, state: Float[Tensor, "T cols"]) -> Float[Tensor, "T R"]:
        """What the one router says of the prompt that each token follows."""
        first = self.first
        assert isinstance(first, PromptExperts)
        width = first.layers[0].shape[1]
        if state.shape[1] != width:
            raise UserError(
                f"the router of {type(self).__name__} reads {width} features, and {self.site.name}, which "
                f"asks first, has {state.shape[1]}; target layers that read the residual stream first, such "
                "as q_proj"
            )
        *before, last = first.layers
        for matrix in before:
            state = torch.relu(exact_logits(state, matrix.to(state.device)))
        return exact_logits(state, last.to(state.device))

    def choice(
        self, logits: Float[Tensor, "T R"], inputs: RouterInput
    ) -> tuple[Float[Tensor, "T R"], dict[str, Tensor]]:
        """One choice for each token, the base first where it is one, and what guides the router."""
        scores = logits.softmax(-1)
        best = scores.argmax(-1)
        losses = {}
        if self.task is not None and inputs.training:
            best = torch.full_like(best, self.task + self.with_base)
            apart = F.cross_entropy(logits, best, reduction="none")
            losses["task"] = self.guidance * mean_of_valid(apart, inputs.valid)
            return F.one_hot(best, scores.shape[-1]).to(scores), losses
        hard = F.one_hot(best, scores.shape[-1]).to(scores)
        return (scores - scores.detach()) + hard, losses
