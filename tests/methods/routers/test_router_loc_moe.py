"""What the router loc_moe promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.routers.loc_moe import LocMoe
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=24, d_expert=8, num_experts=4)


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_rows_stay_orthonormal_in_training() -> None:
    router = LocMoe(SHAPE, pooled_width=8)
    optimizer = torch.optim.SGD(router.parameters(), lr=5.0)
    before = router.rows().detach()
    for _ in range(5):
        routing = router(RouterInput.of(tokens()))
        loss = (routing.scores * torch.arange(4)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = router.rows().detach()
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-5, rtol=1e-5)
    assert (rows - before).abs().max() > 0.01


def test_rows_of_orthonormal_weights_are_the_weights() -> None:
    router = LocMoe(SHAPE, pooled_width=6)
    with torch.no_grad():
        router.weight.copy_(-2 * torch.eye(4, 6))
    torch.testing.assert_close(router.rows(), -torch.eye(4, 6))


def test_logits_are_products_with_means_of_neighbouring_features() -> None:
    router = LocMoe(SHAPE, pooled_width=8, temperature=0.5, top_k=2)
    x = tokens()
    routing = router(RouterInput.of(x))
    pooled = torch.stack([x[:, 3 * group : 3 * group + 3].mean(-1) for group in range(8)], dim=-1)
    torch.testing.assert_close(routing.logits, pooled @ router.rows().T / 0.5)
    top = routing.logits.softmax(-1).topk(2)
    expected = torch.zeros(40, 4).scatter(-1, top.indices, top.values)
    found = torch.zeros(40, 4)
    found[routing.token_ids, routing.expert_ids] = routing.weights
    torch.testing.assert_close(found, expected)


def test_the_locality_loss_by_hand() -> None:
    router = LocMoe(SHAPE, num_nodes=2, local_share=0.8, coefficient=3.0)
    sequences = torch.arange(40) // 10
    valid = torch.arange(40) < 36
    routing = router(RouterInput(x=tokens(), valid=valid, sequence_ids=sequences))
    expected = torch.zeros(())
    # The second sequence is cut, so that both nodes have half of the valid tokens.
    for rows, target in ((slice(0, 18), [0.4, 0.4, 0.1, 0.1]), (slice(18, 36), [0.1, 0.1, 0.4, 0.4])):
        means = routing.scores[rows].mean(0)
        divergence = sum(p * math.log(p / q) for p, q in zip(means.tolist(), target, strict=True))
        expected = expected + divergence / 2
    torch.testing.assert_close(routing.losses["locality"], 3 * expected)


def test_the_loss_draws_tokens_to_their_own_node() -> None:
    router = LocMoe(SHAPE, pooled_width=12, coefficient=1.0)
    sequences = torch.arange(40) // 20
    x = tokens() + torch.where(sequences[:, None] == 0, 1.0, -1.0) * torch.linspace(-1, 1, 24)

    def local_share() -> float:
        routing = router(RouterInput.of(x, sequence_ids=sequences))
        return (routing.expert_ids // 2 == sequences[routing.token_ids]).float().mean().item()

    with torch.no_grad():
        router.weight.neg_()
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    before = local_share()
    for _ in range(60):
        loss = router(RouterInput.of(x, sequence_ids=sequences)).losses["locality"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert local_share() > max(before, 0.8)


@pytest.mark.parametrize("num_sequences", [1, 2, 3])
def test_the_loss_alone_keeps_nodes_even_however_many_sequences(num_sequences: int) -> None:
    router = LocMoe(SHAPE, pooled_width=12, coefficient=1.0)
    x = torch.randn(96, 24, generator=torch.Generator().manual_seed(1))
    inputs = RouterInput.of(x, sequence_ids=torch.arange(96) * num_sequences // 96)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        router(inputs).losses["locality"].backward()
        optimizer.step()
    assert (router(inputs).load[:2].sum() - 48).abs() <= 16


def test_the_lowest_capacity_is_that_of_the_angle() -> None:
    router = LocMoe(SHAPE, pooled_width=4)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    # Pooled to (4, 3, 0, 0) and (1, 0, 0, 0): the wider angle has the cosine 0.8.
    x = torch.zeros(2, 24)
    x[0, :6], x[0, 6:12], x[1, :6] = 4.0, 3.0, 1.0
    assert math.isclose(router.lowest_capacity(x), math.exp(4 * 0.64 / 1.36) / 4, rel_tol=1e-5)
    assert router.lowest_capacity(x[:0]) == 0.25


def test_random_directions_are_no_nearer_than_the_bound_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (2, 4, 16):
        cosines = torch.nn.functional.normalize(torch.randn(20000, width, generator=generator), dim=-1)[:, 0]
        for least in (0.1, 0.3, 0.5, 0.7, 0.9):
            share = (cosines >= least).float().mean().item()
            assert share <= math.exp(-width * least**2 / (2 - least**2))


def test_there_must_be_room_for_orthogonal_rows() -> None:
    with pytest.raises(SettingError, match="pooled_width"):
        LocMoe(SHAPE, pooled_width=3)
    with pytest.raises(SettingError, match="at most 3 for tokens of 3 features, got 4 experts"):
        LocMoe(LayerShape(d_model=3, d_expert=8, num_experts=4))
    with pytest.raises(SettingError, match="must divide the 4 experts"):
        LocMoe(SHAPE, num_nodes=3)
