"""Raising the experts that a task uses in English, whatever language it is asked in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods.decoders import Branch, Decoder, ModelFacts, Probe, Prompt, Sample, View
from mixtura.types.steering import Steering

METHOD = {
    "paper": 109,
    "title": "Multilingual Routing in Mixture-of-Experts",
    "tags": ["steers", "needs:calibration"],
}


@final
class MultilingualSteering(Decoder):
    """Steer middle layers towards the experts that English uses for a task.

    Calibration compares how often each expert is chosen, as a share of a text's tokens, in texts labelled
    ``task`` with those labelled ``general``; experts whose difference is above ``difference`` are the task's.
    While decoding, in the layers between the first and the last ``margin`` of all, their logits are raised by
    ``strength`` standard deviations of the token's logits, or, with ``hard``, above the token's highest.

    Shapes:
        Logits [T, E] to [T, E].

    Raises:
        SettingError: a setting is out of range.
        UserError: the calibration is of another model, or texts of a label are missing.

    Cost:
        One forward pass a token, of one row: weights outside experts and K experts a layer are read once.
        Calibration is one pass over the texts.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> from mixtura.methods.decoders import Calibration
        >>> found = Calibration(method="multilingual_steering", mark="", values={"experts": {"1": [3, 5]}})
        >>> view = MultilingualSteering().open(sample_prompt(calibration=found))[0].views[0]
        >>> view.steering[1].spread.tolist()
        [0.0, 0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0]

    Differences from the paper:
        No code was found; this follows what others quote of its equations. With ``hard`` raised experts come
        before the token's highest by the least step there is, where the paper adds noise of 1e-6 to it.
        Middle layers are all but a sixth at either end, as its 4 to 19 of 24. Labels default to those of
        mixtura's own texts.

    Reference:
        Multilingual Routing in Mixture-of-Experts (paper 109).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"strength": 0.0}

    def __init__(
        self,
        *,
        strength: float = 0.5,
        hard: bool = False,
        difference: float = 0.2,
        margin: float = 1 / 6,
        task: str | None = None,
        general: str | None = None,
    ) -> None:
        check_range("MultilingualSteering", "strength", strength, -100, 100)
        check_range("MultilingualSteering", "difference", difference, -1, 1)
        check_range("MultilingualSteering", "margin", margin, 0, 0.5)
        self.strength = strength
        self.hard = hard
        self.difference = difference
        self.margin = margin
        self.task = task
        self.general = general

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        raised = prompt.made_for_it("multilingual_steering").values["experts"]
        steering = {}
        for layer in prompt.facts.layers:
            experts = raised.get(str(layer.index), [])
            if not experts:
                continue
            mask = torch.zeros(layer.num_experts, dtype=torch.bool)
            mask[experts] = True
            if self.hard:
                steering[layer.index] = Steering(highest=mask)
            elif self.strength:
                steering[layer.index] = Steering(spread=self.strength * mask.float())
        return (Branch(views=(View(steering),)),)

    def calibrate(
        self, probe: Probe, samples: Sequence[Sample], facts: ModelFacts
    ) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        labels = sorted({one.label for one in samples})
        task, general = self._labels(labels)
        first, last = self.margin * facts.num_layers, (1 - self.margin) * facts.num_layers
        means: dict[str, dict[int, Tensor]] = {}
        for label in (task, general):
            own = [probe.run(one.token_ids).chosen for one in samples if one.label == label]
            means[label] = {
                layer.index: torch.stack(
                    [share_of_tokens(chosen[layer.index], layer.num_experts) for chosen in own]
                ).mean(0)
                for layer in facts.layers
            }
        experts = {}
        for layer in facts.layers:
            above = means[task][layer.index] - means[general][layer.index] > self.difference
            if first <= layer.index < last and bool(above.any()):
                experts[str(layer.index)] = above.nonzero().flatten().tolist()
        return {"task": task, "general": general, "experts": experts}, {}

    def _labels(self, labels: Sequence[str]) -> tuple[str, str]:
        task = self.task or next((one for one in labels if one.endswith("-en")), labels[0])
        general = self.general or next((one for one in labels if one == "prose"), labels[-1])
        for one in (task, general):
            if one not in labels:
                raise UserError(f"no text is labelled {one!r}; the labels are {', '.join(labels)}")
        if task == general:
            raise UserError(f"all texts are labelled {task!r}; give texts of a task and general ones")
        return task, general


def share_of_tokens(chosen: Tensor, num_experts: int) -> Tensor:
    """For each expert, the share of tokens that it is chosen for."""
    hot = torch.zeros(len(chosen), num_experts + 1)
    return hot.scatter_(1, chosen.cpu().clamp(max=num_experts), 1.0)[:, :num_experts].mean(0)
