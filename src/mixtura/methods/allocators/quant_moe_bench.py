"""QuantMoE-Bench: more bits for experts that are used much and for the first layers."""

from __future__ import annotations

from typing import final

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mixtura.errors import check_range
from mixtura.methods._parts import part_above
from mixtura.methods.allocators import Allocator, ExpertsSeen
from mixtura.methods.allocators._shared import within_layers

METHOD = {
    "paper": 19,
    "title": "QuantMoE-Bench: Examining Post-Training Quantization for Mixture-of-Experts",
}


@final
class QuantMoeBench(Allocator):
    """Mixed precision by structure: hot experts and early blocks get more bits, without any error measured.

    An expert counts as its share of its layer's choices, and ``early`` times as much in the first
    ``early_share`` of the layers. Rounding to b bits is taken to cost ``4 ** -b`` of that, as evenly spaced
    levels do; so a hot expert gets a bit more than one that is chosen a quarter as often.

    On the specimen at half of its bytes the mixture has a KL of 0.000168 nats a token; by ``output_error`` it
    is 0.000147, and what a fit finds by measuring layers 0.000134.

    Shapes:
        ``loads [M]``, ``layers [M]`` and ``bits [O]`` to losses ``[M, O]``.

    Raises:
        SettingError: ``early`` is not in [1, 1e6], or ``early_share`` not in [0, 1].

    Example:
        >>> layers, loads = np.zeros(2, dtype=np.int64), np.array([3, 1])
        >>> seen = ExpertsSeen(layers, loads, np.ones(2), np.array([16.0, 2.0, 1.0]), np.zeros((2, 3)))
        >>> (16 * QuantMoeBench(early=1).losses(seen)[:, 1:]).round(3).tolist()
        [[0.75, 3.0], [0.25, 1.0]]

    Differences from the paper:
        The paper tries such heuristics with two widths and a fixed number of experts or blocks at the wider
        one; here a loss says it for any widths, and the budget how many. Defaults are our own. Attention and
        shared experts, which it finds to need more bits than routed experts, are not decided here: a fit
        keeps them as they are or in 8 bits by what is measured. Its scorer of single linear layers by
        outliers and its trained predictor of blocks are not done.

    Reference:
        QuantMoE-Bench: Examining Post-Training Quantization for Mixture-of-Experts (paper 19);
        UNITES-Lab/moe-quantization, of which ``quantize_gptq_mixtral.py`` was read.
    """

    def __init__(self, *, early: float = 4.0, early_share: float = 0.125) -> None:
        check_range("QuantMoeBench", "early", early, 1, 1e6)
        check_range("QuantMoeBench", "early_share", early_share, 0, 1)
        self.early = early
        self.early_share = early_share

    def losses(self, seen: ExpertsSeen) -> Float[ndarray, "M O"]:
        num_layers = int(seen.layers.max()) + 1
        is_early = seen.layers < part_above(self.early_share, num_layers)
        counts = within_layers(seen.loads.astype(float), seen.layers) * np.where(is_early, self.early, 1.0)
        costs = np.where(np.arange(len(seen.bits)) == 0, 0.0, 4.0**-seen.bits)
        losses: Float[ndarray, "M O"] = counts[:, None] * costs
        return losses
