"""Leaving a token's last experts out where they weigh little beside the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods._scores import to_sum_one
from mixtura.methods.decoders import Branch, Decoder, ModelFacts, Probe, Prompt, Sample, View
from mixtura.methods.decoders._shared import answer_divergence
from mixtura.types.steering import Steering

METHOD = {
    "paper": 155,
    "title": "MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs Gains More",
    "tags": ["steers", "needs:calibration"],
}


@final
class OnlinePruning(Decoder):
    """Online dynamic pruning: a token drops its second expert where the first one has nearly all the weight.

    Of each layer, calibration takes the median, over tokens, of the share that a token's last expert has of
    its weights. While new tokens are made, experts whose share is below that are left out in the layers that
    bear it best: those where doing so alone changes answers' distributions least (Kullback-Leibler
    divergence). The other weights stay as they are. The prompt is read with all experts. Fewer experts are
    read from memory, or from disk.

    Args:
        part: the part of the layers in which experts are left out.
        scale: times the medians, what a share must reach.

    Shapes:
        Choices [T, K] to at most K of them.

    Raises:
        SettingError: a setting is out of range.
        UserError: the calibration is of another model, or has no answers.

    Cost:
        One forward pass a token, of one row: weights outside experts are read once, and of a layer's K
        experts only those that are not left out. Calibration is one pass over the texts for each layer and
        two more.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> from mixtura.methods.decoders import Calibration
        >>> values = {"least": [0.25, 0.375], "loss": [0.5, 0.125]}
        >>> found = Calibration(method="online_pruning", mark="", values=values)
        >>> view = OnlinePruning(part=0.5).open(sample_prompt(calibration=found))[0].views[0]
        >>> {layer: float(one.least) for layer, one in view.steering.items()}, view.since
        ({1: 0.375}, 'new')

    Differences from the paper:
        A layer's bound is on the last expert's share of a token's weights, w2 / (w1 + w2) with two experts,
        whose median stands at the same tokens as that of w2 / w1; with more than two experts a token, which
        the paper's rule is not for, any whose share is below leave. The released code has bounds for one
        model in a table, about these medians. Tokens of the prompt keep all experts, where the paper keeps
        those of the 2 % that are attended to most by a score of which the released code sums the wrong axis.
        ``part`` is 10 of 32 layers as in the released code. Bits of experts are the business of quantizers.

    Reference:
        MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs Gains More (paper 155, abstract); the code of
        Aaronhuang-778/MC-MoE as described by others.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"part": 0.0}

    def __init__(self, *, part: float = 0.3125, scale: float = 1.0) -> None:
        check_range("OnlinePruning", "part", part, 0, 1)
        check_range("OnlinePruning", "scale", scale, 0, 100)
        self.part = part
        self.scale = scale

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        found = prompt.made_for_it("online_pruning").values
        steering = self._steering(found["least"], found["loss"], prompt.facts)
        return (Branch(views=(View(steering, since="new"),)),)

    def calibrate(
        self, probe: Probe, samples: Sequence[Sample], facts: ModelFacts
    ) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        answered = [one for one in samples if 0 < one.answer_from < len(one.token_ids)]
        if not answered:
            raise UserError("online_pruning needs questions with answers to measure on; give records of both")
        plain = [probe.run(one.token_ids) for one in answered]
        least = []
        for layer in facts.layers:
            last = torch.cat([to_sum_one(ran.weights[layer.index].float()).amin(-1) for ran in plain])
            least.append(float(last.median()))

        def lost(steering: Mapping[int, Steering]) -> float:
            changed = [probe.run(one.token_ids, steering=steering).logits for one in answered]
            pairs = zip(answered, plain, changed, strict=True)
            return sum(answer_divergence(o.answer_from, ran.logits, c) for o, ran, c in pairs) / len(answered)

        loss = [
            lost({layer.index: Steering(least=torch.tensor(bound * self.scale))})
            for layer, bound in zip(facts.layers, least, strict=True)
        ]
        divergence = lost(self._steering(least, loss, facts))
        return {"least": least, "loss": loss, "divergence": divergence}, {}

    def _steering(
        self, least: Sequence[float], loss: Sequence[float], facts: ModelFacts
    ) -> dict[int, Steering]:
        order = sorted(range(len(loss)), key=lambda place: (loss[place], place))
        chosen = sorted(order[: round(self.part * len(order))])
        return {
            facts.layers[place].index: Steering(least=torch.tensor(min(least[place] * self.scale, 1.0)))
            for place in chosen
        }
