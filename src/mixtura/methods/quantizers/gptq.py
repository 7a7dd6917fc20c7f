"""GPTQ: evenly spaced levels, each column's rounding error made up for by the columns still to come."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.quantizers import Encoded, Quantizer
from mixtura.methods.quantizers._feedback import fitted_scales, levels_with_feedback
from mixtura.methods.quantizers._levels import EvenLevels
from mixtura.methods.quantizers._shared import check_finite, levels_of

METHOD = {
    "paper": None,
    "title": "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
}


@final
class Gptq(Quantizer):
    """Round to evenly spaced levels, column by column, so that the outputs lose least.

    Columns are rounded one by one, those with the largest inputs first. What a column is off is made up for
    by changing the columns that are not rounded yet, as the inputs' second moments say; so errors that
    the outputs would feel most are pushed to where they feel least. Scales are those of least squared
    error, weighed by the size of the inputs, before; after, they are fitted to the outputs once more.
    What is stored is laid out as ``round_to_nearest`` does it, and runs as fast.

    Without ``moments`` every input counts the same, and no column makes up for another.

    Shapes:
        ``[R, C]`` to ``codes [R, ceil(C * bits / 8)]`` and ``scales [R, ceil(C / group_size)]``; the
        last group of a row may be short.

    Raises:
        SettingError: ``bits`` is not 8, 4 or 2, or ``group_size`` not in [1, 65536].
        UserError: the matrix holds NaN or infinity, or its moments do.

    Example:
        >>> weight = torch.tensor([[-0.75, -0.25, 0.25, 0.75]])
        >>> encoded = Gptq(bits=2).encode(weight, torch.eye(4))
        >>> encoded.tensors["codes"].tolist(), Gptq(bits=2).decode(encoded).tolist()
        ([[228]], [[-0.75, -0.25, 0.25, 0.75]])

    Differences from the paper:
        Levels are symmetric, half a step beside zero, and scales come of a search instead of the whole
        range and are fitted again. Scales of groups are chosen before any column is rounded, so that
        columns may go in the order of their inputs with groups of neighbours (in GPTQ's code the options
        ``act_order`` and ``static_groups``). Damping is a hundredth of the mean of the diagonal, as there.

    Reference:
        GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar, Ashkboos,
        Hoefler and Alistarh, 2022; not in the collection). Rows of the collection measure it as a baseline
        for mixtures of experts, among them QuantMoE-Bench (paper 19).
    """

    def __init__(self, *, bits: int = 4, group_size: int = 64) -> None:
        self._levels = EvenLevels("Gptq", bits, group_size)
        self.bits = bits
        self.group_size = group_size

    @property
    def form(self) -> str:
        return "levels"

    @torch.no_grad()
    def encode(self, weight: Float[Tensor, "R C"], moments: Float[Tensor, "C C"] | None = None) -> Encoded:
        check_finite(weight)
        whole, cols = weight.float(), weight.shape[1]
        group, half = self._levels.group(cols), self._levels.half
        importance = None if moments is None else moments.diagonal().float().clamp(min=0)
        if importance is not None and not bool(importance.any()):
            importance = moments = None
        scales = self._levels.scales(whole, importance).to(torch.bfloat16).float()

        def nearest(column: Tensor, scale: Tensor) -> Tensor:
            return levels_of(column.clone()[:, None, None], scale[:, None], half).flatten()

        chosen = levels_with_feedback(whole, moments, scales, group, nearest)
        scales = fitted_scales(whole, chosen, moments, scales, group)
        return self._levels.encoded(chosen.add_(half).to(torch.uint8), scales)

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R C"]:
        return self._levels.decode(encoded, dtype)

    def num_bytes(self, rows: int, cols: int) -> int:
        return self._levels.num_bytes(rows, cols)
