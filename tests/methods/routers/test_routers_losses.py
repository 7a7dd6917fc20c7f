"""Losses that belong to routers: evenness and likeness over valid tokens."""

from __future__ import annotations

import torch

from mixtura.methods.routers._losses import alikeness, unevenness


def test_unevenness_of_even_collapsed_and_half_filled_places() -> None:
    valid = torch.ones(4, dtype=torch.bool)
    one_each = torch.arange(4)[:, None]
    assert unevenness(one_each, torch.full((4, 4), 0.25), valid).item() == 1
    assert unevenness(torch.zeros(4, 1, dtype=torch.long), torch.eye(4)[[0, 0, 0, 0]], valid).item() == 4
    # Shares of choices 3/4 and 1/4, mean scores 0.7 and 0.3: 2 * (0.525 + 0.075).
    chosen = torch.tensor([[0], [0], [0], [1]])
    scores = torch.tensor([0.7, 0.3]).expand(4, 2)
    torch.testing.assert_close(unevenness(chosen, scores, valid), torch.tensor(1.2))
    assert unevenness(chosen, scores, ~valid).item() == 0


def test_unevenness_leaves_padding_out() -> None:
    chosen, scores = torch.tensor([[0], [1], [0]]), torch.tensor([[0.6, 0.4], [0.4, 0.6], [1.0, 0.0]])
    valid = torch.tensor([True, True, False])
    torch.testing.assert_close(unevenness(chosen, scores, valid), torch.tensor(1.0))


def test_alikeness_counts_pairs_of_different_outputs() -> None:
    outputs = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]]])
    # Cosines 1, 0, 0 and -1, 0, 0, each pair twice, over nine.
    torch.testing.assert_close(alikeness(outputs), torch.tensor([2 / 9, -2 / 9]))
    assert alikeness(outputs[:, :1]).tolist() == [0, 0]
