"""What the pruner pre_moe promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.errors import UserError
from mixtura.methods.pruners.pre_moe import PreMoe
from mixtura.types import Budget
from mixtura.types.trace import Trace


def trace_of(sums: list[list[float]], num_tokens: list[int]) -> Trace:
    """One layer of four experts with these sums of top logits by domain; each expert has 10 tokens."""
    trace = sample_trace(num_layers=1, num_experts=4, top_k=1)
    trace = trace if len(sums) == 2 else trace.of("prose")
    layer = replace(
        trace.layers[0],
        counts=torch.full((len(sums), 4), 10),
        statistics={"top_logit": torch.tensor(sums) / 10},
    )
    return replace(trace, num_tokens=tuple(num_tokens), layers=(layer,))


STORED = trace_of([[80.0, 40.0, 0.0, 10.0], [0.0, 3.0, 9.0, 6.0]], [40, 10])


def test_each_task_keeps_its_own() -> None:
    assert PreMoe().plan(STORED.of("prose"), Budget(num_experts=2)).dropped() == {0: (2, 3)}
    assert PreMoe().plan(STORED.of("code"), Budget(num_experts=2)).dropped() == {0: (0, 1)}


def test_an_expert_that_wins_with_negative_logits_ranks_below_one_that_never_wins() -> None:
    trace = trace_of([[-5.0, 0.0, 4.0, 3.0]], [40])
    assert PreMoe().plan(trace, Budget(num_experts=3)).dropped() == {0: (0,)}


@pytest.mark.parametrize(
    ("sums", "num_tokens", "expected"),
    [
        # Means over tokens: prose 2 1 0 0.25, code 0 0.3 0.9 0.6.
        ([[4.0, 2.0, 0.0, 0.0]], [2], "prose"),
        ([[0.0, 60.0, 180.0, 120.0]], [200], "code"),
        ([[100.0, 50.0, 0.0, 12.0]], [50], "prose"),
    ],
)
def test_a_prompt_finds_the_nearest_task_whatever_its_length(
    sums: list[list[float]], num_tokens: list[int], expected: str
) -> None:
    assert PreMoe().retrieve(STORED, trace_of(sums, num_tokens)) == expected


def test_domains_of_a_prompt_are_pooled_by_their_tokens() -> None:
    # Means over all its tokens are those of its long domain, about.
    prompt = trace_of([[1.0, 0.0, 0.0, 0.0], [0.0, 30.0, 90.0, 60.0]], [1, 100])
    assert PreMoe().retrieve(STORED, prompt) == "code"


def test_traces_of_different_models_are_not_compared() -> None:
    with pytest.raises(UserError, match="observe the prompt with the model"):
        PreMoe().retrieve(STORED, replace(STORED, source_digest="sha256:0"))
    with pytest.raises(UserError, match="no MoE layers"):
        PreMoe().retrieve(replace(STORED, layers=()), STORED)


def test_tasks_and_prompts_without_text_are_not_taken_for_like_ones() -> None:
    empty = trace_of([[80.0, 40.0, 0.0, 10.0], [0.0, 0.0, 0.0, 0.0]], [40, 0])
    # Nearer to nothing than to prose, of which there is text.
    assert PreMoe().retrieve(empty, trace_of([[0.1, 0.0, 0.0, 0.0]], [10])) == "prose"
    with pytest.raises(UserError, match="has no tokens to tell a task by"):
        PreMoe().retrieve(STORED, trace_of([[0.0] * 4], [0]))
