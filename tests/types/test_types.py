"""The records: routings, budgets and plans."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtura.errors import UserError
from mixtura.types import Action, Budget, Drop, Plan, Quantize, RouterInput, Routing


def routing(choices: list[list[int]], valid: list[bool] | None = None, num_experts: int = 4) -> Routing:
    """The routing of these choices, weighted 0.0, 0.1, 0.2 ... in order."""
    ids = torch.tensor(choices)
    weights = 0.1 * torch.arange(ids.numel()).view(ids.shape)
    scores = torch.zeros(len(choices), num_experts)
    mask = torch.tensor(valid if valid is not None else [True] * len(choices))
    return Routing.from_choices(ids, weights, scores=scores, logits=scores, valid=mask)


def test_assignments_are_sorted_by_expert_and_stable() -> None:
    made = routing([[2, 0], [0, 1], [2, 1]])
    assert made.expert_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.token_ids.tolist() == [0, 1, 1, 2, 0, 2]
    assert made.weights.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.0, 0.4])
    assert made.load.tolist() == [2, 2, 2, 0]
    assert made.offsets.tolist() == [2, 4, 6, 6]
    assert made.rank.tolist() == [0, 1, 0, 1, 0, 1]


def test_ids_outside_the_experts_are_absent_choices() -> None:
    made = routing([[0, 4], [-1, 3], [9, 9]])
    assert list(zip(made.token_ids.tolist(), made.expert_ids.tolist(), strict=True)) == [(0, 0), (1, 3)]


def test_tokens_that_are_not_valid_have_no_assignment() -> None:
    made = routing([[0, 1], [0, 1], [0, 1]], valid=[True, False, True])
    assert made.token_ids.tolist() == [0, 2, 0, 2]


def test_no_tokens() -> None:
    made = routing([[0]])
    empty = Routing.from_choices(
        torch.zeros(0, 2, dtype=torch.long),
        torch.zeros(0, 2),
        scores=made.scores[:0],
        logits=made.logits[:0],
        valid=made.valid[:0],
    )
    assert (empty.num_tokens, empty.num_experts, empty.load.tolist()) == (0, 4, [0, 0, 0, 0])


@given(st.data())
def test_every_present_choice_is_kept_once(data: st.DataObject) -> None:
    num_tokens, top_k = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    choice = st.lists(st.integers(-1, 5), min_size=top_k, max_size=top_k)
    choices = data.draw(st.lists(choice, min_size=num_tokens, max_size=num_tokens))
    valid = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    made = routing(choices, valid)
    expected = sorted(
        (expert, token)
        for token, row in enumerate(choices)
        for expert in row
        if valid[token] and 0 <= expert < 4
    )
    assert list(zip(made.expert_ids.tolist(), made.token_ids.tolist(), strict=True)) == expected
    assert int(made.load.sum()) == len(expected)


def test_gradient_flows_to_the_weights() -> None:
    weights = torch.rand(3, 2, requires_grad=True)
    scores = torch.zeros(3, 4)
    made = Routing.from_choices(
        torch.tensor([[0, 1], [4, 2], [3, 0]]),
        weights,
        scores=scores,
        logits=scores,
        valid=torch.tensor([True, True, False]),
    )
    made.weights.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[1, 1], [0, 1], [0, 0]]


def test_router_input_of_counts_every_token() -> None:
    given_input = RouterInput.of(torch.zeros(3, 2), layer=4)
    assert given_input.valid.tolist() == [True] * 3
    assert given_input.layer == 4


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Budget(num_experts=1).num_experts = 2  # type: ignore[misc]


@pytest.mark.parametrize("fields", [{}, {"num_bytes": 1, "num_experts": 1}, {"num_bytes": -1}])
def test_a_budget_is_one_amount(fields: dict[str, int]) -> None:
    with pytest.raises(UserError, match="Budget"):
        Budget(**fields)


PLAN = Plan(
    "sha256:1",
    (Drop(2, (1, 3)), Quantize(0, 1, "round_to_nearest", {"bits": 4}), Drop(2, (0,)), Drop(1, ())),
)


def test_a_plan_survives_json() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert Plan.from_json(PLAN.to_json()).to_json() == PLAN.to_json()


def test_dropped_joins_the_drops_of_a_layer() -> None:
    assert PLAN.dropped() == {2: (0, 1, 3)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "this is not a plan"),
        ("[]", "not a plan of version 1"),
        (json.dumps({"version": 2, "source_digest": "", "actions": []}), "not a plan of version 1"),
        (
            json.dumps({"version": 1, "source_digest": "", "actions": [{"kind": "drp"}]}),
            "no action named 'drp' in a plan; did you mean 'drop'",
        ),
        (
            json.dumps({"version": 1, "source_digest": "", "actions": [{"kind": "drop", "layer": 1}]}),
            "needs the fields \\['experts', 'layer'\\], got \\['layer'\\]",
        ),
    ],
)
def test_bad_plans_are_told_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan.from_json(text)


def test_actions_name_their_kind() -> None:
    assert Drop(0, (1,)).to_dict() == {"kind": "drop", "layer": 0, "experts": (1,)}
    assert Action.from_dict({"kind": "drop", "layer": 0, "experts": [1]}) == Drop(0, (1,))
