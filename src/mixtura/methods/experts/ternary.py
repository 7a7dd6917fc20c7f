"""Ternary experts: weights of -1, 0 and 1 times one scale, trained as if they were not rounded."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods._activations import swiglu
from mixtura.methods._precision import exact
from mixtura.methods.experts import Bank
from mixtura.methods.experts._shared import begun, drawn_matrices
from mixtura.types import LayerShape, Matrices

METHOD = {
    "paper": 27,
    "title": "MoTE: Mixture of Ternary Experts for Memory-efficient Large Multimodal Models",
    "tags": ["materialises", "token_independent", "rounds"],
}
_EPS = 1e-5
_LEVELS = 127


@final
class Ternary(Bank):
    """Gated experts whose matrices hold -s, 0 and s, made of weights that are trained in full precision.

    Each matrix of an expert, gate, up and down, is rounded anew in every pass: ``s`` is the mean of its
    absolute values, and a weight becomes ``s * clip(round(w / s), -1, 1)``. The gradient goes through the
    rounding as if it were not there. With ``quantize_inputs`` the rows that matrices read are rounded to 8
    bits as well, each by its own largest value. A trained expert needs 2 bits a weight; `packed` has them.

    Shapes:
        ``x [N, D]`` to ``[N, D]``; parameters ``gate_up_proj [E, 2F, D]`` and ``down_proj [E, D, F]``.

    Example:
        >>> bank = Ternary(LayerShape(d_model=4, d_expert=8, num_experts=3))
        >>> [len(one.unique()) for one in bank.matrices().down]
        [3, 3, 3]

    Differences from the paper:
        Only the abstract and a summary were at hand; the formulas are those of BitNet b1.58. The frozen dense
        part beside the experts is ``shared_width`` of the layer with ``shared_frozen``; the upcycler `mote`
        makes both of a trained dense model. Gate and up have a scale each.

    Reference:
        MoTE: Mixture of Ternary Experts for Memory-efficient Large Multimodal Models (paper 27, abstract and
        a summary).
    """

    def __init__(self, shape: LayerShape, *, quantize_inputs: bool = True, seed: int = 0) -> None:
        super().__init__(shape)
        self.quantize_inputs = quantize_inputs
        self.seed = seed
        generator = begun(seed)
        self.gate_up_proj = drawn_matrices(generator, shape.num_experts, 2 * shape.d_expert, shape.d_model)
        self.down_proj = drawn_matrices(generator, shape.num_experts, shape.d_model, shape.d_expert)

    def matrices(self) -> Matrices:
        halves = [rounded(half) for half in self.gate_up_proj.chunk(2, dim=1)]
        prepare = rows_rounded if self.quantize_inputs else None
        return Matrices(torch.cat(halves, dim=1), rounded(self.down_proj), self._between, prepare=prepare)

    def _between(self, features: Float[Tensor, "n F2"]) -> Float[Tensor, "n F"]:
        hidden = swiglu(features)
        return rows_rounded(hidden) if self.quantize_inputs else hidden

    @torch.no_grad()
    def packed(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each matrix as bytes of four 2-bit levels, -1, 0 and 1 as 0, 1 and 2, and the scales ``[E]``."""
        halves = self.gate_up_proj.chunk(2, dim=1)
        return {
            name: packed(weight)
            for name, weight in (("gate", halves[0]), ("up", halves[1]), ("down", self.down_proj))
        }


def levels(weight: Float[Tensor, "E R A"]) -> tuple[Float[Tensor, "E R A"], Float[Tensor, "E 1 1"]]:
    """Each matrix as -1, 0 and 1, and its scale."""
    wide = exact(weight)
    scale = wide.abs().mean((1, 2), keepdim=True)
    return (wide / (scale + _EPS)).round().clamp(-1, 1), scale


def rounded(weight: Float[Tensor, "E R A"]) -> Float[Tensor, "E R A"]:
    """The matrices in three levels; their gradient is that of the weights."""
    found, scale = levels(weight.detach())
    return _through(weight, (found * scale).to(weight.dtype))


def rows_rounded(x: Float[Tensor, "n A"]) -> Float[Tensor, "n A"]:
    """Each row in 255 levels up to its largest value; the gradient goes through as if it were not rounded."""
    wide = exact(x.detach())
    step = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _LEVELS
    return _through(x, ((wide / step).round() * step).to(x.dtype))


def _through(value: Tensor, shown: Tensor) -> Tensor:
    """``shown`` in the forward pass, the gradient of ``value`` in the backward pass."""
    return shown + (value - value.detach()) if value.requires_grad else shown


def packed(weight: Float[Tensor, "E R A"]) -> tuple[Tensor, Tensor]:
    """Four levels a byte, the first in the lowest bits, rows one after another; and the scales."""
    found, scale = levels(weight)
    codes = (found + 1).to(torch.uint8).flatten(1)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)).view(len(codes), -1, 4)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)
    return (codes << shifts).sum(-1, dtype=torch.uint8), scale.flatten()
