"""What the adapter dyn_mole promises beyond its kind's contract."""

from __future__ import annotations

import torch
from methods.adapters.adapter_sites import linear_site

from mixtura.methods.adapters.dyn_mole import DynMole
from mixtura.types import RouterInput


def shares_of(scores: list[float], **settings: float) -> torch.Tensor:
    """The shares of one token whose probabilities are given."""
    made = DynMole(linear_site(), rank=2, num_experts=len(scores), **settings)
    with torch.no_grad():
        made.gate.zero_()
        made.gate[:, 0] = torch.tensor(scores).clamp(min=1e-9).log()
    found = made.change(RouterInput.of(torch.eye(16)[:1])).shares
    assert found is not None
    return found[0]


def test_an_unsure_router_gives_all_and_a_sure_one_two() -> None:
    assert (shares_of([0.125] * 8) > 0).all()
    assert (shares_of([1.0, 0, 0, 0, 0, 0, 0, 0]) > 0).sum() == 2


def test_the_expert_that_crosses_the_share_is_left_out() -> None:
    kept = shares_of([0.5, 0.2, 0.15, 0.1, 0.05], threshold=2.0)
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.2, 0, 0, 0]), rtol=1e-4, atol=1e-6)
    kept = shares_of([0.5, 0.2, 0.15, 0.1, 0.05], threshold=2.0, top_p=0.86)
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.2, 0.15, 0, 0]), rtol=1e-4, atol=1e-6)


def test_entropy_is_that_of_tsallis_over_its_greatest() -> None:
    made = DynMole(linear_site(), rank=2, num_experts=4, q=2.0)
    scores = torch.tensor([[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [1.0, 0, 0, 0]])
    # At q = 2 it is one minus the sum of squares.
    expected = torch.tensor([1.0, (1 - 0.52) / 0.75, 0.0])
    torch.testing.assert_close(made.entropy(scores), expected, rtol=1e-3, atol=1e-4)
