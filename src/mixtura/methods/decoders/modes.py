"""Leaving experts out whose weight matters little in their layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods._scores import to_sum_one
from mixtura.methods.decoders import (
    Branch,
    Decoder,
    LayerFacts,
    ModelFacts,
    Probe,
    Prompt,
    Sample,
    View,
)
from mixtura.methods.decoders._shared import answer_divergence, largest_that_leaves
from mixtura.types.steering import Steering

METHOD = {
    "paper": 66,
    "title": (
        "MoDES: Accelerating Mixture-of-Experts Multimodal Large Language Models via Dynamic Expert Skipping"
    ),
    "tags": ["steers", "needs:calibration"],
}


@final
class Modes(Decoder):
    """Dynamic expert skipping: leave a chosen expert out if its weight times its layer's importance is small.

    An expert is left out for a token where (share of the token's weights) times (importance of the layer) is
    below a threshold; the other weights stay as they are. Calibration measures importance, how much the
    answers' distributions change (Kullback-Leibler divergence) when the layer's routed experts add nothing,
    and then takes the largest threshold that leaves at most the part ``skip`` of experts out.

    Shapes:
        Choices [T, K] to at most K of them.

    Raises:
        SettingError: a setting is out of range.
        UserError: the calibration is of another model, or has no answers.

    Cost:
        One forward pass a token, of one row: weights outside experts are read once, and of a layer's K
        experts only those that are not left out. Calibration is one pass over the texts for each layer and
        three more.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> from mixtura.methods.decoders import Calibration
        >>> values = {"importance": [0.75, 0.25], "threshold": 0.1}
        >>> found = Calibration(method="modes", mark="", values=values)
        >>> view = Modes().open(sample_prompt(calibration=found))[0].views[0]
        >>> [round(float(view.steering[layer].least), 3) for layer in (0, 1)]
        [0.133, 0.4]

    Differences from the paper:
        Text only: one importance and one threshold, where the paper has them for images, too, and searches
        both over a grid along their frontier. A threshold is chosen by how many experts it leaves out, as the
        divergence grows with it; the paper's target is to leave out 80 % and more, of its models' 8 experts a
        token. A layer that is left out for measuring adds nothing, where the paper's code hands on its
        normalised input.

    Reference:
        MoDES: Accelerating Mixture-of-Experts Multimodal Large Language Models via Dynamic Expert Skipping
        (paper 66).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"threshold": 0.0}

    def __init__(self, *, threshold: float | None = None, skip: float = 0.4) -> None:
        check_range("Modes", "threshold", 0.0 if threshold is None else threshold, 0, 1e6)
        check_range("Modes", "skip", skip, 0, 1)
        self.threshold = threshold
        self.skip = skip

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        found = prompt.made_for_it("modes").values
        threshold = found["threshold"] if self.threshold is None else self.threshold
        return (Branch(views=(View(_steering(threshold, found["importance"], prompt.facts)),)),)

    def calibrate(
        self, probe: Probe, samples: Sequence[Sample], facts: ModelFacts
    ) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        answered = [one for one in samples if 0 < one.answer_from < len(one.token_ids)]
        if not answered:
            raise UserError("modes needs questions with answers to measure on; give records of both")
        plain = [probe.run(one.token_ids) for one in answered]
        importance = []
        for layer in facts.layers:
            nothing = {layer.index: Steering(scale=torch.zeros(layer.num_experts))}
            importance.append(
                sum(
                    answer_divergence(
                        one.answer_from, ran.logits, probe.run(one.token_ids, steering=nothing).logits
                    )
                    for one, ran in zip(answered, plain, strict=True)
                )
            )
        whole = sum(importance) or 1.0
        shares = [value / whole for value in importance]
        scored = torch.cat(
            [
                to_sum_one(ran.weights[layer.index].float()).flatten() * share
                for ran in plain
                for layer, share in zip(facts.layers, shares, strict=True)
            ]
        )
        threshold = largest_that_leaves(scored, self.skip) if self.skip else 0.0
        steering = _steering(threshold, shares, facts)
        changed = [probe.run(one.token_ids, steering=steering).logits for one in answered]
        lost = [
            answer_divergence(o.answer_from, r.logits, c)
            for o, r, c in zip(answered, plain, changed, strict=True)
        ]
        values = {
            "importance": shares,
            "threshold": threshold,
            "left_out": float((scored < threshold).float().mean()),
            "divergence": sum(lost) / len(lost),
        }
        return values, {}


def _steering(threshold: float, importance: Sequence[float], facts: ModelFacts) -> dict[int, Steering]:
    if not threshold:
        return {}
    by_layer = dict(zip((layer.index for layer in facts.layers), importance, strict=True))

    def steer(layer: LayerFacts) -> Steering:
        # No expert is more than all of its token's weights, so that more would leave out a whole layer.
        least = threshold / max(by_layer[layer.index], 1e-12)
        return Steering(least=torch.tensor(min(least, 1e6)))

    return facts.steer_all(steer)
