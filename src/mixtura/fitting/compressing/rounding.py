"""Rounding the experts of one layer when the calibration text reaches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.checkpoints.applying.merging import merged_expert
from mixtura.checkpoints.packed import MATRICES, MatrixName
from mixtura.checkpoints.rounded import Encodings, RoundedExperts
from mixtura.checkpoints.view import LayerView
from mixtura.fitting.calibration import Seen, calibrated, side_by_side
from mixtura.fitting.compressing.records import LayerRounding
from mixtura.kernels import ExpertTensors
from mixtura.kernels.backend import math_of
from mixtura.methods import create
from mixtura.methods.quantizers import LayerSeen
from mixtura.types import Merge, Plan, Quantize


@final
@dataclass(frozen=True, eq=False)
class Shrunk:
    """What a plan leaves of every layer's experts, and how these are to be rounded.

    Attributes:
        plan: of drops and merges.
        quantizer: name of the quantizer.
        settings: of it.
    """

    plan: Plan
    quantizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def dropped(self) -> dict[int, tuple[int, ...]]:
        """Experts that are gone, by decoder layer."""
        return self.plan.dropped()

    def stored(self, layer: LayerView) -> dict[int, tuple[int, ...]]:
        """The experts of a layer that are stored, and the numbers under which the router chooses each."""
        merges = self._merges(layer)
        gone = set(self.dropped.get(layer.index, ()))
        gone |= {expert for merge in merges.values() for expert in merge.experts[1:]}
        alone = [expert for expert in range(layer.num_experts) if expert not in gone]
        return {expert: merges[expert].experts if expert in merges else (expert,) for expert in alone}

    def tensors(self, layer: LayerView, expert: int) -> ExpertTensors:
        """The matrices of a stored expert, before they are rounded."""
        merge = self._merges(layer).get(expert)
        return layer.native_expert(expert) if merge is None else merged_expert(layer, merge)

    def _merges(self, layer: LayerView) -> dict[int, Merge]:
        """Groups that became one, by the expert that they are stored as."""
        return {merge.experts[0]: merge for merge in self.plan.merged().get(layer.index, ())}

    def action(self, layer: int, expert: int) -> Quantize:
        """Rounding one stored expert, as part of a plan."""
        return Quantize(layer, expert, self.quantizer, dict(self.settings))

    def whole_plan(self, layers: Sequence[LayerView]) -> Plan:
        """The plan with the rounding of all that stays."""
        actions = [self.action(layer.index, expert) for layer in layers for expert in self.stored(layer)]
        return Plan(self.plan.source_digest, (*self.plan.actions, *actions))


@final
class LayerRounder:
    """Rounds all experts of a layer before the first of them runs; a `mixtura.kernels.AssignmentObserver`.

    Args:
        layer: the layer.
        module: its experts, which say what is computed around their matrices.
        shrunk: what stays and how it is rounded.
        kept: where rounded experts are kept; what is there already is not rounded again.
    """

    def __init__(self, layer: LayerView, module: Any, shrunk: Shrunk, kept: RoundedExperts) -> None:
        self._layer = layer
        self._math = math_of(module)
        self._shrunk = shrunk
        self._kept = kept
        self._quantizer = create("quantizers", shrunk.quantizer, **shrunk.settings)
        self._first = self._quantizer
        self._stored = shrunk.stored(layer)
        self._place = {member: expert for expert, members in self._stored.items() for member in members}

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """Round every expert with what the layer is given."""
        missing = [e for e in self._stored if not self._kept.has(self._action(e))]
        if not missing:
            return
        absent = top_k_index >= self._layer.num_experts
        seen = Seen(hidden, top_k_index.masked_fill(absent, -1), top_k_weights)
        average = seen.average
        self._first = self._quantizer.for_layer(self._layer_seen(seen))
        side_by_side(lambda expert: self._round(expert, seen, average), missing)

    def _layer_seen(self, seen: Seen) -> LayerSeen:
        """All of the layer, by the numbers of experts that are stored."""
        # The last place is that of choices that are absent.
        stored = torch.full((self._layer.num_experts + 1,), -1)
        for member, expert in self._place.items():
            stored[member] = expert

        def first(expert: int) -> Tensor:
            up = self._shrunk.tensors(self._layer, expert).up
            return up.mT if self._layer.layout.transposed else up

        return LayerSeen(
            seen.hidden, stored[seen.index], tuple(self._stored), first, self._layer.router_weight()
        )

    def expert(
        self,
        expert: int,
        token_ids: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        inputs: Float[Tensor, "n D"],
        outputs: Float[Tensor, "n D"],
    ) -> None:
        """Nothing is recorded of rounded experts as they run."""

    def finish(self) -> None:
        """Nothing is left to do after them."""

    def decoded(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """What runs under an expert's number: the expert that is stored for it, as it was rounded."""
        kept = self._kept.read(self._action(self._place[expert]))
        return self._decoded(kept.encodings, kept.biases, dtype)

    def _action(self, expert: int) -> Quantize:
        return self._shrunk.action(self._layer.index, expert)

    def _decoded(
        self, encodings: Encodings, biases: Mapping[MatrixName, Tensor], dtype: torch.dtype
    ) -> ExpertTensors:
        up, down = (self._quantizer.decode(encodings[matrix], dtype) for matrix in MATRICES)
        if self._layer.layout.transposed:
            up, down = up.mT, down.mT
        return ExpertTensors(up, down, biases.get("up"), biases.get("down")).to(dtype)

    @torch.no_grad()
    def _round(self, expert: int, seen: Seen, average: Float[Tensor, "D D"]) -> None:
        members = self._stored[expert]
        self._layer.check_finite(members)
        tensors = self._shrunk.tensors(self._layer, expert)
        known = calibrated(seen, average, members, tensors, self._math)
        named = {"up": tensors.up_bias, "down": tensors.down_bias}
        biases = {matrix: bias for matrix in MATRICES if (bias := named[matrix]) is not None}
        transposed = self._layer.layout.transposed
        up, down = ((m.mT if transposed else m).contiguous() for m in (tensors.up, tensors.down))
        encodings: Encodings = {
            "up": self._first.encode(up, known.up_moments),
            "down": self._quantizer.encode(down, known.down_moments),
        }
        changed = self._decoded(encodings, biases, tensors.up.dtype)
        facts = {
            "error": known.error(self._math, changed),
            "whole": known.whole,
            "num_tokens": len(known.inputs),
        }
        self._kept.write(self._action(expert), encodings, facts, biases)


def roundings(
    layers: Sequence[LayerView], shrunk: Shrunk, kept: RoundedExperts
) -> tuple[tuple[LayerRounding, ...], dict[int, dict[int, int]]]:
    """How far rounding moved the outputs of every layer, and how many tokens each expert was rounded by."""
    found, loads = [], {}
    for layer in layers:
        facts = {e: kept.facts(shrunk.action(layer.index, e)) for e in shrunk.stored(layer)}
        whole = sum(float(one["whole"]) for one in facts.values())
        error = sum(float(one["error"]) for one in facts.values())
        share = error / whole if whole else 0.0
        found.append(LayerRounding(layer=layer.index, num_experts=len(facts), error=share))
        loads[layer.index] = {expert: int(one["num_tokens"]) for expert, one in facts.items()}
    return tuple(found), loads
