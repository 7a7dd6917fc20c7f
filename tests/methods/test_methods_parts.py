"""Shares of whole numbers, and the methods that take some."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
import torch

from mixtura.authoring.contracts import sample_dense_trace
from mixtura.errors import UnmetError
from mixtura.methods._parts import part_above, part_of
from mixtura.methods.allocators import ExpertsSeen
from mixtura.methods.allocators.quant_moe_bench import QuantMoeBench
from mixtura.methods.upcyclers.read_me import ReadMe
from mixtura.types.upcycling import DenseShape, UpcycleShape


def test_shares_as_they_are_written() -> None:
    for hundredths in range(101):
        exact = Fraction(hundredths, 100)
        for number in (1, 3, 7, 50, 100, 1408, 11008):
            assert part_of(hundredths / 100, number) == floor(exact * number)
            assert part_above(hundredths / 100, number) == ceil(exact * number)


def read_me_width(keep: float, d_ffn: int) -> int:
    dense = DenseShape(d_model=6, d_ffn=d_ffn, num_layers=1, num_words=64)
    trace = sample_dense_trace(dense)
    domains = torch.stack([torch.arange(d_ffn).float(), torch.arange(d_ffn, 0, -1).float()])
    trace = replace(trace, layers=(replace(trace.layers[0], domains=domains),))
    made = ReadMe(keep=keep).recipe((dense,), UpcycleShape(num_experts=2, top_k=1), trace)
    sizes: dict[str, int] = made.own["layers"][0]
    return sizes["d_expert"] + sizes["shared_width"]


def test_read_me_keeps_exactly_the_share_that_is_given() -> None:
    assert read_me_width(0.29, 100) == 29
    with pytest.raises(UnmetError, match=r"keep 0.01 of 8 neurons is none; give a larger keep"):
        read_me_width(0.01, 8)


def test_seven_of_a_hundred_layers_are_early() -> None:
    number = 100
    layers, ones = np.arange(number), np.ones(number)
    seen = ExpertsSeen(layers, ones.astype(int), ones, np.array([16.0, 4.0]), np.zeros((number, 2)))
    losses = QuantMoeBench(early=4, early_share=0.07).losses(seen)[:, 1]
    assert int((losses > losses[-1]).sum()) == 7
