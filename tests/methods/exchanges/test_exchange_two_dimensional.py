"""What the exchange two_dimensional promises beyond its contract; running/parallel sends rows by it."""

from __future__ import annotations

import torch

from mixtura.methods.exchanges.two_dimensional import TwoDimensional


def test_rows_are_sent_as_they_are() -> None:
    rows, seats = torch.randn(5, 3), torch.tensor([3, 0, 1, 0, 2])
    packed = TwoDimensional().pack(rows, seats)
    assert packed.rows is rows
    assert packed.seats is seats
    assert TwoDimensional().hops() == ("within", "between")
