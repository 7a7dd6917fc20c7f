"""What the allocator quant_moe_bench promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
import pytest

from mixtura.errors import SettingError
from mixtura.fitting.allocate import allocate
from mixtura.methods.allocators import ExpertsSeen
from mixtura.methods.allocators.quant_moe_bench import QuantMoeBench

BITS = np.array([16.0, 4.0, 3.0, 2.0])


def seen(loads: list[int], layers: list[int]) -> ExpertsSeen:
    number = len(loads)
    return ExpertsSeen(np.array(layers), np.array(loads), np.ones(number), BITS, np.zeros((number, 4)))


def test_the_rule_by_a_loop() -> None:
    loads, layers = [5, 15, 1, 3, 2, 2, 10, 30], [0, 0, 1, 1, 2, 2, 3, 3]
    found = QuantMoeBench(early=3, early_share=0.3).losses(seen(loads, layers))
    for expert, layer in enumerate(layers):
        share = loads[expert] / sum(n for n, own in zip(loads, layers, strict=True) if own == layer)
        # 0.3 of four layers begin to be two.
        counts = share * (3 if layer < 2 else 1)
        wanted = [0.0, *(counts / 4**bits for bits in (4, 3, 2))]
        assert found[expert].tolist() == pytest.approx(wanted)


def test_hot_experts_and_early_layers_get_the_bits() -> None:
    losses = QuantMoeBench().losses(seen([90, 5, 5, 90, 5, 5], [0, 0, 0, 1, 1, 1]))
    sizes = np.tile((BITS * 10).astype(int), (6, 1))
    chosen = BITS[allocate(np.where(BITS == 16, np.inf, losses), sizes, 6 * 30)]
    assert chosen[0] == 4
    assert chosen[0] >= chosen[3] > chosen[4]
    assert chosen[1] >= chosen[4]


def test_settings() -> None:
    with pytest.raises(SettingError, match="early"):
        QuantMoeBench(early=0.5)
    with pytest.raises(SettingError, match="early_share"):
        QuantMoeBench(early_share=1.5)
