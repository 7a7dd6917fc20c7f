"""What one expert and one MoE layer look like, whatever way the family stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.kernels import ExpertTensors
from mixtura.types import LayerShape


@final
@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How a family stores its experts.

    ``transposed``: weights are ``[in, out]`` instead of ``[out, in]``. ``interleaved``: gate and up
    rows alternate instead of gate first, up after. ``has_gate``: a gate beside the up projection.
    ``has_post_norm``: a norm after each expert. ``custom_gate``: the activation is the family's own
    ``_apply_gate`` instead of ``act_fn(gate) * up``.
    """

    transposed: bool = False
    interleaved: bool = False
    has_bias: bool = False
    has_gate: bool = True
    has_post_norm: bool = False
    custom_gate: bool = False

    @property
    def name(self) -> str:
        """One word for tables: ``default`` or the flags that differ from it, joined by ``+``."""
        flags = {
            "transposed": self.transposed,
            "interleaved": self.interleaved,
            "bias": self.has_bias,
            "ungated": not self.has_gate,
            "post_norm": self.has_post_norm,
            "custom_gate": self.custom_gate,
        }
        return "+".join(name for name, on in flags.items() if on) or "default"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors of an experts module that hold one slice per expert."""
        up = "gate_up_proj" if self.has_gate else "up_proj"
        names = (up, "down_proj")
        return (*names, f"{up}_bias", "down_proj_bias") if self.has_bias else names


@final
@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert in the one canonical orientation: ``[out features, in features]``.

    ``down(act(gate(x)) * up(x))`` for a gated expert; ``gate`` is `None` for an ungated one.
    """

    gate: Float[Tensor, "F D"] | None
    up: Float[Tensor, "F D"]
    down: Float[Tensor, "D F"]
    gate_bias: Float[Tensor, " F"] | None = None
    up_bias: Float[Tensor, " F"] | None = None
    down_bias: Float[Tensor, " D"] | None = None

    @staticmethod
    def from_native(native: ExpertTensors, layout: ExpertLayout) -> ExpertWeights:
        """Views (no copies) of an expert stored in its family's layout, in canonical orientation."""
        up = native.up.T if layout.transposed else native.up
        down = native.down.T if layout.transposed else native.down
        gate, up = _split(up, layout)
        gate_bias, up_bias = (None, None) if native.up_bias is None else _split(native.up_bias, layout)
        return ExpertWeights(gate, up, down, gate_bias, up_bias, native.down_bias)

    def to_native(self, layout: ExpertLayout) -> ExpertTensors:
        """The same expert in its family's layout."""
        up, down = _join(self.gate, self.up, layout), self.down
        if layout.transposed:
            up, down = up.T, down.T
        up_bias = None if self.up_bias is None else _join(self.gate_bias, self.up_bias, layout)
        return ExpertTensors(up.contiguous(), down.contiguous(), up_bias, self.down_bias)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _split(fused: Tensor, layout: ExpertLayout) -> tuple[Tensor | None, Tensor]:
    """Gate and up halves of a fused tensor, along its first axis."""
    if not layout.has_gate:
        return None, fused
    if layout.interleaved:
        return fused[0::2], fused[1::2]
    half = fused.shape[0] // 2
    return fused[:half], fused[half:]


def _join(gate: Tensor | None, up: Tensor, layout: ExpertLayout) -> Tensor:
    """Inverse of `_split`."""
    if not layout.has_gate or gate is None:
        return up
    if layout.interleaved:
        return torch.stack([gate, up], dim=1).reshape(-1, *up.shape[1:])
    return torch.cat([gate, up])


@final
@dataclass(frozen=True, slots=True)
class Site:
    """Where one MoE layer is in its model, in the model's own names.

    ``index`` is the decoder layer's number. A model with several stacks of MoE layers (a talker, a
    vision tower) numbers the layers of further stacks after those of the first, so that an index
    names one layer. ``expert_axes`` maps every tensor outside the experts module that has one entry
    per expert (router rows, correction bias, scales) to its expert axis; entries after the first E
    (a skip class, shared experts' rows) belong to no routed expert.
    """

    index: int
    stack: str
    name: str
    block_name: str
    router_name: str
    layout: ExpertLayout
    shape: LayerShape
    top_k: int
    num_groups: int
    top_groups: int
    router_weight: str
    correction_bias: str | None
    shared_experts: tuple[str, ...]
    expert_axes: dict[str, int]
    hash_routed: bool
    scoring: str
