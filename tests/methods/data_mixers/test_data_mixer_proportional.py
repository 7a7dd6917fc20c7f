"""Shares by size: what one heap of all text comes to."""

from __future__ import annotations

import torch

from mixtura.methods.data_mixers import Domains, mix
from mixtura.methods.data_mixers.proportional import Proportional


def test_a_share_is_that_of_the_heap() -> None:
    heap = ["a"] * 6 + ["b"] * 3 + ["c"]
    sizes = torch.tensor([float(heap.count(name)) for name in "abc"])
    known = Domains(("a", "b", "c"), sizes, 10, 5)
    wanted = torch.tensor([heap.count(name) / len(heap) for name in "abc"]).double()
    torch.testing.assert_close(mix(Proportional(), known, torch.ones(3)), wanted)
