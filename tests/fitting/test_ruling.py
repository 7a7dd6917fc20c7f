"""What allocators are told of the experts of a checkpoint, and what comes of tight budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny_model

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.fitting.palette import STORED
from mixtura.fitting.pricing import experts_of, option_bytes
from mixtura.fitting.records import Prices
from mixtura.fitting.ruling import rules_of, source_bits


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_widths_are_bits_of_a_weight_whatever_the_dtype_of_the_source(
    tmp_path: Path, dtype: torch.dtype, bits: int
) -> None:
    tiny_model("qwen3_moe").to(dtype).save_pretrained(tmp_path)
    layers = open_checkpoint(tmp_path).layers
    assert source_bits(layers) == bits
    parts = experts_of(layers)
    number = len(parts.numbers)
    sizes = np.tile(option_bytes(layers[0]), (number, 1))
    prices = Prices(parts, sizes, np.ones(sizes.shape), np.ones(number, dtype=int), weights=np.ones(number))
    (rule,) = rules_of(["quant_moe_bench"], prices, source_bits(layers))
    # A bit less costs four times as much: what ways lose, beside each other, says how wide they are.
    widest, *others = STORED
    tensors = layers[0].native_expert(0)
    num_weights = tensors.up.numel() + tensors.down.numel()
    for way in others:
        apart = np.log(rule.losses[0, way] / rule.losses[0, widest]) / np.log(4)
        assert apart == pytest.approx(8 * (sizes[0, widest] - sizes[0, way]) / num_weights, rel=0.1)
