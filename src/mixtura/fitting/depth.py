"""How much a fit measures: all of it where the time allows, less where the model is large for its time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.fitting.pace import Pace
from mixtura.fitting.palette import STORED
from mixtura.fitting.quality import HeldOut
from mixtura.fitting.texts import Texts

# Of the time, what observing may be predicted to take, and how many candidates must fit besides: in full
# the uniform widths and the first mixtures, at least the plain plan and one mixture.
_OBSERVING_SHARE = 0.7
_CANDIDATES_IN_FULL = 6
_FEWEST_CANDIDATES = 2
# Predictions are made of the best of repeats.
_CAUTION = 1.3
# From most to least: calibration tokens, held-out tokens, experts of each layer that are rounded while the
# model is observed, ways in which they are.
_LESS = (
    (8192, 4096, None, 4),
    (8192, 4096, None, 3),
    (8192, 4096, None, 2),
    (8192, 2048, None, 2),
    (4096, 2048, 16, 2),
    (2048, 1024, 8, 2),
    (1024, 1024, 4, 2),
    (512, 512, 2, 2),
)
_FEWEST_SEQUENCES = 2
_LEAST_WIDTH = 128
_MOST_ROUNDED_BYTES = 256 << 20


@final
@dataclass(frozen=True, slots=True)
class Depth:
    """How much is measured.

    Attributes:
        calibration_tokens: tokens the model is observed on; `None` for all there are.
        held_out_tokens: tokens candidates are judged by; `None` for all there are.
        priced_experts: experts of each layer that are rounded in every way while the model is observed;
            what rounding costs the others follows from the size of their outputs. `None` for all.
        options: ways of storing that are tried; `None` for all there are.
    """

    calibration_tokens: int | None = None
    held_out_tokens: int | None = None
    priced_experts: int | None = None
    options: tuple[int, ...] | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """Ways of storing that are tried, from most bytes to fewest."""
        return tuple(STORED) if self.options is None else self.options

    @property
    def is_full(self) -> bool:
        """Whether nothing is left out."""
        return self == Depth()

    @property
    def told(self) -> str:
        """What is left out, as the end of a sentence."""
        few = (
            ""
            if self.priced_experts is None
            else (f"{self.priced_experts} experts of each layer are rounded to price them all, ")
        )
        names = ", ".join(STORED[option].name for option in self.stored)
        return (
            f"experts are stored at {names} or not at all, {few}the model is observed on about "
            f"{self.calibration_tokens} tokens and candidates are judged on {self.held_out_tokens}"
        )


@final
@dataclass(frozen=True, slots=True)
class Work:
    """Seconds that the steps of a fit are predicted to take on this machine."""

    view: CheckpointView
    pace: Pace

    def observing_s(
        self, num_tokens: int, priced_experts: int | None, options: Sequence[int] = tuple(STORED)
    ) -> float:
        """Running the original once and pricing its experts; every expert is read twice, once cold."""
        pace, seconds = self.pace, 0.0
        rounding = sum(pace.round_s[option] for option in options)
        for layer in self.view.layers:
            priced = min(priced_experts or layer.num_experts, layer.num_experts)
            weights = _weights(layer.shape.d_model, layer.shape.d_expert, layer.layout.has_gate)
            multiplied = 1 + len(options) * priced / layer.num_experts
            seconds += layer.num_experts * layer.expert_num_bytes * (pace.cold_s + pace.read_s)
            seconds += weights * (priced * rounding + num_tokens * layer.top_k * multiplied * pace.row_s)
        return seconds + num_tokens * self._num_layers * pace.token_s

    def pass_s(self, parts: Sequence[HeldOut], option: int | None = None) -> float:
        """Running the original, or a candidate with every expert at one option, on held-out text.

        Each part of the text runs by itself, and reads every expert and decodes what is in fewer bits.
        """
        pace, seconds, num_tokens = self.pace, 0.0, positions(parts)
        for layer in self.view.layers:
            weights = _weights(layer.shape.d_model, layer.shape.d_expert, layer.layout.has_gate)
            seconds += len(parts) * layer.num_experts * layer.expert_num_bytes * pace.read_s
            seconds += weights * num_tokens * layer.top_k * pace.row_s
            if not self.keeps_rounded:
                seconds += len(parts) * layer.num_experts * weights * pace.decode_s.get(option or 0, 0.0)
        return seconds + num_tokens * (self._num_layers * pace.token_s + pace.head_s)

    def candidate_s(self, parts: Sequence[HeldOut], options: Sequence[int] = tuple(STORED)) -> float:
        """The dearest candidate of one width: a search does not know yet which it will need."""
        return max(self.pass_s(parts, option) for option in options)

    def rounding_s(self, option: int, done: int | None = 0) -> float:
        """Rounding every expert of which observing has not rounded ``done`` in each layer; None for all."""
        weights = (
            max(0, layer.num_experts - (layer.num_experts if done is None else done))
            * _weights(layer.shape.d_model, layer.shape.d_expert, layer.layout.has_gate)
            for layer in self.view.layers
        )
        return sum(weights) * self.pace.round_s[option]

    @property
    def keeps_rounded(self) -> bool:
        """Whether the model is so small that experts once rounded are kept for the next candidate."""
        return keeps_rounded(self.view)

    @property
    def _num_layers(self) -> int:
        return int(self.view.config.get_text_config().num_hidden_layers)


def keeps_rounded(view: CheckpointView) -> bool:
    """Whether all roundings of all experts together take less than PyTorch itself does."""
    return len(STORED) * view.num_bytes <= _MOST_ROUNDED_BYTES


def _weights(d_model: int, d_expert: int, has_gate: bool) -> int:
    return d_model * d_expert * (3 if has_gate else 2)


def positions(parts: Sequence[HeldOut]) -> int:
    """Tokens that really run, padding included."""
    return sum(part.input_ids.numel() for part in parts)


def choose_depth(work: Work, texts: Texts, time_s: float, near: Sequence[int] = tuple(STORED)) -> Depth:
    """The most that is predicted to fit the time, or the least there is.

    ``near`` are ways of storing, the one that a budget needs most first.
    """
    if _fits(work, texts, Depth(), time_s, _CANDIDATES_IN_FULL):
        return Depth()
    for calibration, held_out, priced, num_options in _LESS:
        depth = Depth(calibration, held_out, priced, tuple(sorted(near[:num_options])))
        if _fits(work, texts, depth, time_s, _FEWEST_CANDIDATES):
            break
    return depth


def options_near(sizes: Mapping[int, int], budget_bytes: int) -> tuple[int, ...]:
    """Ways of storing all experts, those first that a mixture for a budget is made of.

    Args:
        sizes: bytes of all experts by option.
        budget_bytes: what they may take together.
    """
    fitting = [option for option in sorted(sizes) if sizes[option] <= budget_bytes]
    larger = [option for option in sorted(sizes, reverse=True) if sizes[option] > budget_bytes]
    first = [*fitting[:1], *larger[:1]]
    return (*first, *fitting[1:], *larger[1:])


def _fits(work: Work, texts: Texts, depth: Depth, time_s: float, num_candidates: int) -> bool:
    cut = shortened(texts, depth)
    observing = _CAUTION * work.observing_s(positions(cut.calibration), depth.priced_experts, depth.stored)
    judging = _CAUTION * (
        work.pass_s(cut.held_out) + num_candidates * work.candidate_s(cut.held_out, depth.stored)
    )
    # The plain plan and a mixture meet every expert in two ways at most.
    judging += _CAUTION * 2 * max(work.rounding_s(option, depth.priced_experts) for option in depth.stored)
    return observing <= _OBSERVING_SHARE * time_s and observing + judging <= time_s


def shortened(texts: Texts, depth: Depth) -> Texts:
    """Texts of about so many tokens, the first of every kind, in sequences of one length.

    They run together then, where texts of several lengths would each read the whole model.
    """
    if depth.is_full:
        return texts
    return replace(
        texts,
        calibration=(_merged(texts.calibration, depth.calibration_tokens),),
        held_out=(_merged(texts.held_out, depth.held_out_tokens),),
    )


def _merged(parts: Sequence[HeldOut], num_tokens: int | None) -> HeldOut:
    width = max(_LEAST_WIDTH, min(part.input_ids.shape[1] for part in parts))
    width = min(width, max(part.input_ids.shape[1] for part in parts))
    share = math.inf if num_tokens is None else num_tokens / len(parts)
    firsts = [_first(_cut(part, width), share) for part in parts]
    names = tuple(dict.fromkeys(name for part in firsts for name in part.domain_names))

    def together(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in firsts]
        return torch.cat([pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    return HeldOut(
        input_ids=together("input_ids"),
        attention_mask=together("attention_mask"),
        domains=np.array([names.index(part.domain_names[d]) for part in firsts for d in part.domains]),
        domain_names=names,
        groups=tuple(group for part in firsts for group in part.groups),
        answers=together("answers"),
    )


def _cut(part: HeldOut, width: int) -> HeldOut:
    """Every sequence up to ``width`` tokens; one that is cut has no answer to be exact about."""
    whole = ~part.attention_mask[:, width:].any(1)
    return replace(
        part,
        input_ids=part.input_ids[:, :width],
        attention_mask=part.attention_mask[:, :width],
        answers=part.answers[:, :width] & whole[:, None],
    )


def _first(part: HeldOut, num_tokens: float) -> HeldOut:
    lengths = part.attention_mask.sum(1).numpy()
    rows = max(_FEWEST_SEQUENCES, int((np.cumsum(lengths) - lengths < num_tokens).sum()))
    return replace(
        part,
        input_ids=part.input_ids[:rows],
        attention_mask=part.attention_mask[:rows],
        domains=part.domains[:rows],
        groups=part.groups[:rows],
        answers=part.answers[:rows],
    )
