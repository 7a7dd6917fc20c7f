"""The mathematics that routers share, against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError, UserError
from mixtura.methods._scores import masked
from mixtura.methods.routers._shared import (
    attended,
    best_of_groups,
    best_per_group,
    by_position,
    check_parts,
    cosine_logits,
    dealt,
    present,
    rank_in_sequence,
    sinkhorn,
)
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
