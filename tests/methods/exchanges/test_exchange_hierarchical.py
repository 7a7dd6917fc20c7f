"""What the exchange hierarchical promises beyond its contract; running/parallel sends real rows by it."""

from __future__ import annotations

import torch

from mixtura.methods.exchanges.hierarchical import Hierarchical


def test_rows_are_sent_as_they_are() -> None:
    rows, seats = torch.randn(5, 3), torch.tensor([3, 0, 1, 0, 2])
    packed = Hierarchical().pack(rows, seats)
    assert packed.rows is rows
    assert packed.seats is seats
    assert Hierarchical().hops() == ("between", "within")
