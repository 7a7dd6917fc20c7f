"""The mathematics that routers share, against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError, UserError
from mixtura.methods.routers._capacity import places_in_rounds
from mixtura.methods.routers._shared import (
    attended,
    best_of_groups,
    best_per_group,
    by_position,
    check_parts,
    cosine_logits,
    dealt,
    entropy,
    exact_logits,
    gumbel_like,
    masked,
    orthogonal,
    plain_logits,
    present,
    rank_in_sequence,
    sinkhorn,
    to_sum_one,
)
from mixtura.methods.routers._shared import drawn as parameter
from mixtura.types import RouterInput


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_the_best_of_each_group() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 5.0, 5.0]])
    assert best_per_group(scores, 2, 1).tolist() == [[0, 4]]
    assert best_per_group(scores, 3, 2).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert best_per_group(scores[:0], 2, 1).shape == (0, 2)


def test_the_best_within_the_best_groups() -> None:
    scores = torch.tensor([[9.0, 0.0, 5.0, 5.0, 8.0, 0.0]])
    # Rated by one score the groups are 9, 5, 8; by two 9, 10, 8.
    assert best_of_groups(scores, 3, 2, 2).tolist() == [[0, 4]]
    assert best_of_groups(scores, 3, 1, 2, rated_by=2).tolist() == [[2, 3]]


def test_groups_with_few_allowed_experts_are_rated_by_those() -> None:
    scores = torch.tensor([[0.5, 0.4, 0.9, 0.8]])
    for allowed, best in (([1, 0, 1, 0], [2]), ([0, 0, 1, 0], [2]), ([1, 1, 0, 0], [0]), ([0, 1, 0, 1], [3])):
        usable = masked(scores, torch.tensor([allowed], dtype=torch.bool))
        chosen = best_of_groups(usable, 2, 1, 1, rated_by=2)
        assert present(chosen, usable).tolist() == [best]


def test_masked_experts_are_absent_unless_none_is_left() -> None:
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    logits = masked(drawn(2, 3), allowed)
    chosen = torch.tensor([[0, 1, 2], [0, 1, 2]])
    assert present(chosen, logits).tolist() == [[0, 3, 2], [0, 1, 2]]


def test_cosines_lie_within_one_over_the_temperature() -> None:
    x, rows = drawn(5, 4), drawn(3, 4, seed=1)
    expected = torch.nn.functional.cosine_similarity(x[:, None], rows[None], dim=-1) / 0.5
    torch.testing.assert_close(cosine_logits(x, rows, 0.5), expected)
    assert (cosine_logits(torch.zeros(1, 4), rows) == 0).all()


def test_entropy_of_a_sure_and_an_unsure_token() -> None:
    found = entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0]).where(found == 0, torch.tensor(2.0).log()))


def test_weights_over_their_sum_with_zeros() -> None:
    found = to_sum_one(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    assert found.tolist() == [[0.25, 0.75], [0.0, 0.0]]


@pytest.mark.parametrize("total", [1e-45, 1e-42, 1e-38, 1e-20])
def test_weights_that_all_but_vanish_have_finite_gradients(total: float) -> None:
    weights = torch.tensor([[0.25 * total, 0.75 * total]], requires_grad=True)
    found = to_sum_one(weights)
    assert ((found >= 0) & (found <= 1)).all()
    (1e6 * found[0, 0]).backward()
    assert weights.grad is not None
    assert torch.isfinite(weights.grad).all()
    if total > 1e-30:
        torch.testing.assert_close(found[0].detach(), torch.tensor([0.25, 0.75]))
        expected = torch.tensor([[0.75, -0.25]]).double() / total * 1e6
        torch.testing.assert_close(weights.grad.double(), expected, rtol=1e-5, atol=0)


def test_entropy_has_finite_gradients_where_a_probability_is_nothing() -> None:
    logits = torch.tensor([[0.0, -104.0], [0.0, -2.0]], requires_grad=True)
    entropy(logits.softmax(-1)).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], torch.zeros(2))
    exact = torch.tensor([0.0, -2.0], dtype=torch.float64, requires_grad=True)
    (-(exact.softmax(0) * exact.log_softmax(0)).sum()).backward()
    torch.testing.assert_close(logits.grad[1].double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_places_in_rounds_by_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    chosen = torch.rand(40, 5, generator=generator).argsort(-1)[:, :3]
    chosen[::7, 2] = 5
    priority = torch.randint(0, 3, (40,), generator=generator).float()
    valid = torch.arange(40) % 5 != 3
    found = places_in_rounds(chosen, priority, valid, 5)
    queues = [0] * 5
    order = sorted(range(40), key=lambda token: -float(priority[token]))
    for choice in range(3):
        for token in order:
            expert = int(chosen[token, choice])
            if valid[token] and expert < 5:
                assert found[token, choice] == queues[expert]
                queues[expert] += 1


def test_products_are_as_without_autocast() -> None:
    x, rows = drawn(5, 16), drawn(3, 16, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ rows.T).dtype == torch.bfloat16
        found = exact_logits(x, rows)
        assert torch.equal(plain_logits(x, rows), found)
    assert torch.equal(found, x @ rows.T)
    assert plain_logits(x.bfloat16(), rows).dtype == torch.float32
    assert plain_logits(x.bfloat16(), rows.bfloat16()).dtype == torch.bfloat16


def test_seeds_may_be_any_whole_number() -> None:
    assert torch.equal(parameter(1 << 70, 4), parameter(0, 4))
    assert not torch.equal(parameter(-1 << 70, 4), parameter(1, 4))
    for seed in (-1, 7, (1 << 64) - 1):
        expected = torch.randn(4, generator=torch.Generator().manual_seed(seed)) / 2
        assert torch.equal(parameter(seed, 4), expected)


def test_gumbel_noise_has_its_mean_and_is_finite() -> None:
    noise = gumbel_like(torch.zeros(200_000), torch.Generator().manual_seed(0))
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)


def test_a_transport_plan_has_even_columns_and_rows_of_one() -> None:
    valid = torch.arange(40) < 32
    plan = sinkhorn(3 * drawn(40, 4), valid, num_iterations=100)
    torch.testing.assert_close(plan[:32].sum(-1), torch.ones(32))
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 8.0), rtol=1e-3, atol=0)
    assert (plan[32:] == 0).all()
    assert (sinkhorn(drawn(3, 4), torch.zeros(3, dtype=torch.bool), num_iterations=3) == 0).all()


def test_ranks_within_a_sequence() -> None:
    scores, sequences = drawn(9, 2), torch.tensor([1, 0, 1, 0, 0, 1, 2, 1, 0])
    valid = torch.tensor([True] * 7 + [False, True])
    found = rank_in_sequence(scores, valid, sequences)
    for token in range(9):
        mine = (sequences == sequences[token]) & valid
        for expert in range(2):
            better = int((scores[mine, expert] > scores[token, expert]).sum())
            assert found[token, expert] == (better if valid[token] else int(mine.sum()))


def attention(positions: Tensor, length: int) -> Tensor:
    drawn_weights = torch.rand(positions.numel(), length, generator=torch.Generator().manual_seed(5))
    kept = drawn_weights * (torch.arange(length) <= positions[:, None])
    return kept / kept.sum(-1, keepdim=True)


def test_attended_values_are_means_over_the_own_sequence() -> None:
    sequences, positions = torch.tensor([0, 0, 1, 0, 1, 1]), torch.tensor([0, 1, 0, 2, 1, 2])
    weights, values = attention(positions, 3), drawn(6, 2)
    inputs = RouterInput.of(drawn(6, 4), sequence_ids=sequences, positions=positions, attention=weights)
    found, _ = attended(values, inputs, "Mine")
    for token in range(6):
        expected = torch.zeros(2)
        for other in range(6):
            if sequences[other] == sequences[token]:
                expected += weights[token, positions[other]] * values[other]
        torch.testing.assert_close(found[token], expected)


def test_history_takes_the_place_of_earlier_tokens() -> None:
    sequences, positions = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    weights, values = attention(positions, 3), drawn(6, 2)
    x = drawn(6, 4)
    whole = RouterInput.of(x, sequence_ids=sequences, positions=positions, attention=weights)
    expected, table = attended(values, whole, "Mine")
    history: dict[str, Tensor] = {}
    for place in range(3):
        rows = (positions == place).nonzero().squeeze(-1)
        step = RouterInput.of(
            x[rows],
            sequence_ids=sequences[rows],
            positions=positions[rows],
            attention=weights[rows, : place + 1],
            history=history,
        )
        found, history = attended(values[rows], step, "Mine")
        torch.testing.assert_close(found, expected[rows])
    torch.testing.assert_close(history["values"], table["values"])


def test_positions_are_asked_for() -> None:
    with pytest.raises(UserError, match="Mine cannot route without positions"):
        by_position(drawn(2, 2), RouterInput.of(drawn(2, 2)), "Mine")


def test_labels_are_asked_for_by_name() -> None:
    inputs = RouterInput.of(drawn(2, 2), labels={"domain": torch.tensor([0, 1])})
    assert inputs.label("domain", "Mine").tolist() == [0, 1]
    with pytest.raises(UserError, match="Mine cannot route without labels named 'language', got domain"):
        inputs.label("language", "Mine")


def test_rows_at_right_angles() -> None:
    rows = orthogonal(3, 5, seed=1, gain=0.5).detach()
    torch.testing.assert_close(rows @ rows.T, 0.25 * torch.eye(3))
    assert not torch.equal(rows, orthogonal(3, 5, seed=2, gain=0.5))


def test_tokens_are_dealt_out_in_equal_runs_by_sequence() -> None:
    every = torch.ones(8, dtype=torch.bool)
    # As many equally long sequences as places, or twice as many: whole ones.
    assert dealt(torch.tensor([0, 3, 1, 2, 0, 3, 1, 2]), every, 2).tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    # One sequence is cut, padding does not count, and a longer one is shared.
    assert dealt(torch.zeros(8, dtype=torch.long), every, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    valid = torch.tensor([True, False, False, True, False, True, True, False])
    assert dealt(torch.zeros(8, dtype=torch.long), valid, 2)[valid].tolist() == [0, 0, 1, 1]
    assert dealt(torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), every, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert dealt(torch.tensor([0, 1, 2]), every[:3], 2).tolist() == [0, 0, 1]
    assert dealt(torch.zeros(0, dtype=torch.long), every[:0], 2).shape == (0,)
    assert dealt(torch.zeros(3, dtype=torch.long), ~every[:3], 2).tolist() == [0, 0, 0]


def test_parts_must_divide_the_experts() -> None:
    check_parts("Mine", "num_parts", 3, 6)
    for count in (0, 4, 7):
        with pytest.raises(SettingError, match="num_parts of Mine"):
            check_parts("Mine", "num_parts", count, 6)
