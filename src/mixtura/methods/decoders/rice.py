"""Weighting the experts more that fire at thinking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods.decoders import Branch, Decoder, ModelFacts, Probe, Prompt, Sample, View
from mixtura.methods.decoders._shared import pairs_by_layer
from mixtura.types.steering import Steering

METHOD = {
    "paper": 4,
    "title": (
        "Two Experts Are All You Need for Steering Thinking: Reinforcing Cognitive Effort in MoE Reasoning "
        "Models Without Additional Training"
    ),
    "tags": ["steers", "needs:calibration"],
}


@final
class Rice(Decoder):
    """Reinforce cognitive experts: multiply the weights of the experts most tied to thinking tokens.

    Calibration reads texts and finds the ``top`` experts of the whole model with the highest normalised
    pointwise mutual information between a token's class and the expert being chosen for it. The class is the
    tokens ``thinking`` (ids), or else those of the label that most texts do not have: give texts that think
    and others. While decoding, the weights of these experts, where they are chosen, are multiplied by
    ``factor``.

    Shapes:
        Weights [T, K] to [T, K].

    Raises:
        SettingError: a setting is out of range.
        UserError: the calibration is of another model, or its texts have no token of the class.

    Cost:
        One forward pass a token, of one row: weights outside experts and K experts a layer are read once.
        Calibration is one pass over the texts.

    Example:
        >>> from mixtura.methods.decoders.rice import npmi
        >>> import torch
        >>> npmi(torch.tensor([4.0, 2.0]), torch.tensor([4.0, 8.0]), 4.0, 16.0).tolist()
        [1.0, 0.0]

    Differences from the paper:
        No code was found. The factor acts on the weight of an expert that is chosen anyway, without
        normalising after it, as the texts on the paper leave open. The factor is 64 in the paper, from a
        grid; here 2, since small models break sooner. The class of tokens is the user's, where the paper's is
        the delimiters of thinking.

    Reference:
        Two Experts Are All You Need for Steering Thinking: Reinforcing Cognitive Effort in MoE Reasoning
        Models Without Additional Training (paper 4).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"factor": 1.0}

    def __init__(self, *, factor: float = 2.0, top: int = 2, thinking: list[int] | None = None) -> None:
        check_range("Rice", "factor", factor, 0, 1e6)
        check_range("Rice", "top", top, 1, 100_000)
        self.factor = factor
        self.top = top
        self.thinking = thinking

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        pairs = prompt.made_for_it("rice").values["experts"]
        steering = {}
        for layer, experts in pairs_by_layer("Rice", pairs, prompt.facts).items():
            scale = torch.ones(layer.num_experts)
            scale[list(experts)] = self.factor
            steering[layer.index] = Steering(scale=scale)
        return (Branch(views=(View(steering),)),)

    def calibrate(
        self, probe: Probe, samples: Sequence[Sample], facts: ModelFacts
    ) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        joint = {layer.index: torch.zeros(layer.num_experts) for layer in facts.layers}
        active = {layer.index: torch.zeros(layer.num_experts) for layer in facts.layers}
        rare = _rarest([one.label for one in samples])
        in_class = total = 0.0
        for one in samples:
            ids = torch.tensor(one.token_ids)
            if self.thinking is not None:
                marked = torch.isin(ids, torch.tensor(self.thinking))
            else:
                marked = torch.full_like(ids, one.label == rare, dtype=torch.bool)
            ran = probe.run(one.token_ids)
            in_class, total = in_class + float(marked.sum()), total + len(ids)
            for index, chosen in ran.chosen.items():
                number = len(active[index])
                hot = torch.zeros(len(chosen), number + 1)
                hot.scatter_(1, chosen.cpu().clamp(max=number), 1.0)
                active[index] += hot[:, :number].sum(0)
                joint[index] += hot[marked, :number].sum(0)
        if not 0 < in_class < total:
            raise UserError(
                "rice needs texts of which some tokens are of the class and some are not; give texts of two "
                "labels, or thinking=[token ids]"
            )
        scores = [(npmi(joint[i], active[i], in_class, total), i) for i in joint]
        best = sorted(
            (-float(value), index, expert)
            for values, index in scores
            for expert, value in enumerate(values.tolist())
        )[: self.top]
        return {"experts": [[i, e] for _, i, e in best], "npmi": [-value for value, _, _ in best]}, {}


def npmi(joint: Tensor, active: Tensor, in_class: float, total: float) -> Tensor:
    """Normalised pointwise mutual information of a class of tokens and each expert, from counts: -1 to 1."""
    both = joint / total
    found = (both * total * total / (active * in_class)).log2() / -both.log2()
    found = torch.where(both >= 1, torch.tensor(1.0), found)
    return torch.where(joint > 0, found, torch.tensor(-1.0))


def _rarest(labels: Sequence[str]) -> str:
    return min(sorted(set(labels)), key=labels.count, default="") if labels else str(math.nan)
