"""What the router top_p promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.balancers.entropy import Entropy
from mixtura.methods.routers.top_p import TopP
from mixtura.types import BalancerInput, LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)
# With rows of the identity a token's logits are its own values.
PLAIN = LayerShape(d_model=4, d_expert=8, num_experts=4)


def plain(p: float) -> TopP:
    router = TopP(PLAIN, p=p)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    return router


@pytest.mark.parametrize(
    ("p", "experts"),
    [(0.0, [2]), (0.5, [2]), (0.55, [0, 2]), (0.79, [0, 2]), (0.85, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_experts_are_taken_until_p_is_reached_the_crossing_one_included(p: float, experts: list[int]) -> None:
    probabilities = torch.tensor([[0.28, 0.15, 0.53, 0.04]])
    routing = plain(p)(RouterInput.of(probabilities.log()))
    assert routing.expert_ids.tolist() == experts
    # As they are, not divided by their sum.
    torch.testing.assert_close(routing.weights, probabilities[0, experts])


def test_equals_a_loop_over_sorted_probabilities() -> None:
    router = TopP(SHAPE, p=0.6)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    routing = router(RouterInput.of(x))
    for token, row in enumerate((x @ router.weight.T).softmax(-1).tolist()):
        mass, taken = 0.0, set()
        for expert in sorted(range(6), key=lambda e: -row[e]):
            taken.add(expert)
            mass += row[expert]
            if mass >= 0.6:
                break
        assert set(routing.expert_ids[routing.token_ids == token].tolist()) == taken
    counts = torch.bincount(routing.token_ids)
    assert counts.min() < counts.max()


def test_an_unsure_token_gets_more_experts_than_a_sure_one() -> None:
    unsure, sure = torch.zeros(1, 4), torch.tensor([[9.0, 0.0, 0.0, 0.0]])
    assert torch.bincount(plain(0.7)(RouterInput.of(torch.cat([unsure, sure]))).token_ids).tolist() == [3, 1]


def test_training_with_the_entropy_loss_lowers_the_number_of_experts() -> None:
    router = TopP(SHAPE, p=0.6)
    inputs = RouterInput.of(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)))
    before = router(inputs).token_ids.numel()
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        Entropy(coefficient=1.0).loss(BalancerInput(routing=router(inputs))).backward()
        optimizer.step()
    assert router(inputs).token_ids.numel() < 0.7 * before


def test_experts_not_allowed_do_not_count_towards_p() -> None:
    allowed = torch.tensor([[True, False, False, True]])
    routing = plain(1.0)(RouterInput.of(torch.zeros(1, 4), allowed=allowed))
    assert routing.expert_ids.tolist() == [0, 3]
    torch.testing.assert_close(routing.weights, torch.tensor([0.5, 0.5]))


def test_experts_not_allowed_are_not_taken_where_probabilities_round_to_less_than_one() -> None:
    allowed = torch.tensor([True, True, True, False, True, True]).expand(200, -1)
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    routing = TopP(SHAPE, p=1.0)(RouterInput.of(x, allowed=allowed))
    assert routing.load[3] == 0
