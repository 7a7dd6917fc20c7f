"""EAQuant: one smoothing of inputs for all experts of a layer, by as many tokens of each, then rounding."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.quantizers import Encoded, LayerSeen, Quantizer
from mixtura.methods.quantizers._feedback import check_moments
from mixtura.methods.quantizers._levels import EvenLevels
from mixtura.methods.quantizers._shared import check_finite, levels_of
from mixtura.methods.quantizers._smoothing import merged_scales, normalised, outlier_scales

METHOD = {
    "paper": 30,
    "title": "EAQuant: Enhancing Post-Training Quantization for MoE Models via Expert-Aware Optimization",
}

# Which features of a last matrix's inputs stand out, and how far they are brought down.
_QUANTILE, _POWER = 0.8, 0.7


@final
class EaQuant(Quantizer):
    """SmoothQuant for experts: columns that meet large inputs are scaled up, rounded, and scaled down again.

    For each feature of a layer's input every expert, and the router, would have a scale of its own: its
    largest input to the power ``alpha`` over its largest weight to the power ``1 - alpha``. All experts get
    the largest of these, so that one smoothing serves whatever the router chooses. Each expert's largest
    input is that of its first ``expert_tokens`` tokens, so that busy experts do not rule; one that no token
    reached goes by the layer's. Of last matrices only columns are scaled whose inputs stand out.
    Then weights are rounded to evenly spaced levels, each group with the scale of least squared error.

    There is no compiled kernel for these codes: a layer decodes an expert before it multiplies.

    Shapes:
        ``[R, C]`` to ``codes [R, ceil(C * bits / 8)]``, ``scales [R, ceil(C / group_size)]`` and
        ``smooth [C]``, both bfloat16; the last group of a row may be short.

    Raises:
        SettingError: ``bits`` is not 8, 4 or 2, ``group_size`` not in [1, 65536], ``alpha`` not in [0, 1] or
            ``expert_tokens`` less than 1.
        UserError: the matrix holds NaN or infinity, or its moments do.

    Example:
        >>> weight, router = torch.tensor([[1.0, 0.3], [0.2, 0.4]]), torch.ones(1, 2)
        >>> hidden, index = torch.tensor([[9.0, 1.0], [8.0, 1.0]]), torch.tensor([[0], [0]])
        >>> seen = LayerSeen(hidden, index, (0,), lambda expert: weight, router)
        >>> EaQuant(bits=2).for_layer(seen).encode(weight).tensors["smooth"].tolist()
        [1.609375, 0.62109375]

    Differences from the paper:
        Weights alone: activations stay as they are, and they are what the paper smooths for. Routers stay as
        they are, too, so that there are no rounded router's logits to align with the original's (the paper
        chooses the ranges of an 8-bit router by the divergence of the chosen experts' probabilities).
        Attention is not rounded. Scales are stored with each matrix in place of being folded into
        the norm before and the matrix before, a number a column. A matrix whose outputs lose more with
        smoothing than without, by its moments, is not smoothed. Which features of a last matrix stand
        out goes by their root mean squares, in place of largest values of either sign. Tokens of an expert
        are taken from the one calibration text; none are drawn besides. The rotations and permutations of
        the released code's base (DuQuant), its fixed clipping to 0.8 of the range and levels with a zero
        point are not here.

        It does not beat plain rounding on the specimen: in the arena (3 seeds) it has
        a KL of 0.0388 nats a token at 2.19 bits where `round_to_nearest` has 0.0372 at 2.25, and 0.00140 at
        4.19 where that has 0.00126 at 4.25; a smoothing scale a column leaves room for groups of 128 only.
        `gptq` has 0.00886 and 0.00046.

    Reference:
        EAQuant: Enhancing Post-Training Quantization for MoE Models via Expert-Aware Optimization (Fu, Ding,
        Han, Yu, Li, Chen, Tang and Wang, 2025, arXiv 2506.13329; paper 30). Its abstract and the released
        code for OLMoE were read, of which ``alpha`` and the two constants for last matrices are the defaults.
    """

    def __init__(
        self, *, bits: int = 4, group_size: int = 64, alpha: float = 0.6, expert_tokens: int = 1024
    ) -> None:
        self._levels = EvenLevels("EaQuant", bits, group_size)
        check_range("EaQuant", "alpha", alpha, 0, 1)
        check_range("EaQuant", "expert_tokens", expert_tokens, 1, 1 << 40)
        self.bits = bits
        self.group_size = group_size
        self.alpha = alpha
        self.expert_tokens = expert_tokens
        self._merged: Tensor | None = None

    def for_layer(self, layer: LayerSeen) -> Quantizer:
        made = EaQuant(
            bits=self.bits, group_size=self.group_size, alpha=self.alpha, expert_tokens=self.expert_tokens
        )
        made._merged = merged_scales(layer, self.alpha, self.expert_tokens)
        return made

    @torch.no_grad()
    def encode(self, weight: Float[Tensor, "R C"], moments: Float[Tensor, "C C"] | None = None) -> Encoded:
        check_finite(weight)
        check_moments(moments)
        whole, smooth = weight.float(), self._merged
        if smooth is None and moments is not None:
            sizes = moments.diagonal().float().clamp(min=0).sqrt()
            smooth = normalised(outlier_scales(sizes, _QUANTILE, _POWER))
        plain = self._rounded(whole, torch.ones(weight.shape[1]))
        if smooth is None:
            return plain
        smoothed = self._rounded(whole, smooth)
        if moments is None:
            return smoothed
        lost = [self._lost(one, whole, moments.float()) for one in (plain, smoothed)]
        return smoothed if lost[1] < lost[0] else plain

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R C"]:
        return self._levels.decode(encoded, torch.float32).div_(encoded.tensors["smooth"].float()).to(dtype)

    def num_bytes(self, rows: int, cols: int) -> int:
        return self._levels.num_bytes(rows, cols) + 2 * cols

    def _rounded(self, weight: Float[Tensor, "R C"], smooth: Float[Tensor, " C"]) -> Encoded:
        scaled, (rows, cols) = weight * smooth, weight.shape
        scales = self._levels.scales(scaled).to(torch.bfloat16).float()
        by_column = scales.repeat_interleave(self._levels.group(cols), dim=1)[:, :cols]
        half = self._levels.half
        levels = levels_of(scaled.view(rows, cols, 1), by_column, half).view(rows, cols)
        made = self._levels.encoded(levels.add_(half).to(torch.uint8), scales)
        return Encoded({**made.tensors, "smooth": smooth.to(torch.bfloat16)}, made.meta)

    def _lost(self, encoded: Encoded, weight: Float[Tensor, "R C"], moments: Float[Tensor, "C C"]) -> float:
        off = self.decode(encoded) - weight
        return float(((off @ moments) * off).sum())
