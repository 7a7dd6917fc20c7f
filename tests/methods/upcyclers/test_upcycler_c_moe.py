"""What the upcycler c_moe promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from dense_checkpoints import dense_model, logits_of, save_dense

import mixtura
from mixtura.authoring.contracts import sample_dense_trace
from mixtura.checkpoints.dense.view import DenseView
from mixtura.data.tokens import TokenBatch
from mixtura.errors import UnmetError
from mixtura.methods.upcyclers._balanced import balanced
from mixtura.methods.upcyclers.c_moe import CMoe
from mixtura.running.dense_tracing import Group, Wanted, trace_dense
from mixtura.running.loading import load_own_model
from mixtura.types.upcycling import Build, Carry, DenseShape, Fill, Recipe, UpcycleShape

DENSE = DenseShape(d_model=6, d_ffn=12, num_layers=1)


def recipe_of(largest: torch.Tensor, num_experts: int = 2, **settings: int) -> Recipe:
    trace = sample_dense_trace(DENSE)
    trace = replace(trace, layers=(replace(trace.layers[0], largest=largest),))
    return CMoe(**settings).recipe((DENSE,), UpcycleShape(num_experts=num_experts, top_k=1), trace)


def test_neurons_that_fire_together_make_an_expert() -> None:
    # Half of the tokens mark 0 to 3, the others 8 to 11; 4 to 7 are marked by all, and so are shared.
    often = [4, 5, 6, 7]
    largest = torch.tensor([[*often, 0, 1, 2, 3], [*often, 8, 9, 10, 11]] * 6)
    recipe = recipe_of(largest, shared=1)
    groups = [recipe.arrays[str(a.neurons)].tolist() for a in recipe.actions if isinstance(a, Build)]
    assert groups[0] == often
    assert sorted(groups[1:]) == [[0, 1, 2, 3], [8, 9, 10, 11]]
    fills = [a for a in recipe.actions if isinstance(a, Fill)]
    stand = recipe.arrays[str(fills[0].rows)].tolist()
    assert [any(one in group for group in groups[1:]) for one in stand] == [True, True]
    assert [(fill.name, fill.matrix, fill.unit) for fill in fills] == [
        ("gate", "gate", True),
        ("up", "up", True),
    ]


def test_who_stands_for_a_cluster_is_nearest_to_its_centre() -> None:
    largest = torch.rand(30, 12, generator=torch.Generator().manual_seed(5)).topk(4).indices
    recipe = recipe_of(largest, shared=1)
    marks = torch.zeros(12, 30)
    marks[largest.T.reshape(-1), torch.arange(30).repeat(4)] = 1
    groups = [recipe.arrays[str(a.neurons)].long() for a in recipe.actions if isinstance(a, Build)]
    stand = next(recipe.arrays[str(a.rows)] for a in recipe.actions if isinstance(a, Fill))
    for group, one in zip(groups[1:], stand.tolist(), strict=True):
        apart = (marks[group] - marks[group].mean(0)).abs().sum(1)
        assert apart[group.tolist().index(one)] == pytest.approx(float(apart.min()))


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_equal_size_at_the_least_distance(seed: int) -> None:
    distances = torch.rand(8, 2, generator=torch.Generator().manual_seed(seed))
    found = balanced(distances)
    assert found.bincount().tolist() == [4, 4]
    every = (choice for choice in product(range(2), repeat=8) if sum(choice) == 4)
    least = min(sum(float(distances[n, g]) for n, g in enumerate(choice)) for choice in every)
    assert float(distances[torch.arange(8), found].sum()) == pytest.approx(least)


def test_groups_are_those_of_a_linear_assignment() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    distances = torch.randint(0, 6, (60, 5), generator=torch.Generator().manual_seed(3)).float()
    found = balanced(distances)
    assert found.bincount().tolist() == [12] * 5
    rows, columns = optimize.linear_sum_assignment(distances.repeat_interleave(12, dim=1).numpy())
    least = distances.repeat_interleave(12, dim=1)[rows, columns].sum()
    assert distances[torch.arange(60), found].sum() == least


def test_the_numbers_that_divide_are_named() -> None:
    with pytest.raises(UnmetError, match=r"12 wide, which 5 equal parts do not make.*: 2, 3, 4, 6"):
        recipe_of(torch.zeros(4, 2, dtype=torch.int64), num_experts=3)


def test_what_is_marked_is_what_is_active_with_rows_of_length_one(tmp_path: Path) -> None:
    view = DenseView(save_dense(tmp_path / "dense", "llama"))
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = TokenBatch(ids, mask, torch.zeros(3, dtype=torch.long), ("text",))
    trace = trace_dense([view], Carry((0,), (1.0,)), [Group(batch)], Wanted(largest=True))
    model = dense_model("llama")
    seen: list[torch.Tensor] = []
    part = model.model.layers[1].mlp
    part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(ids, attention_mask=mask)
        x = torch.nn.functional.normalize(seen[0][mask.bool()], dim=-1)
        gate, up = (torch.nn.functional.normalize(m.weight, dim=-1) for m in (part.gate_proj, part.up_proj))
        hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    wanted = hidden.abs().topk(10).indices.sort().values
    assert trace.layers[1].largest is not None
    assert torch.equal(trace.layers[1].largest.sort().values.long(), wanted)


def test_with_all_experts_on_it_is_the_dense_model(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "qwen3")
    text = tmp_path / "text.txt"
    text.write_text("a line of text with words in it\nand another one, a bit longer than that\n" * 40)
    made = mixtura.upcycle(
        source, tmp_path / "out", method="c_moe", experts=4, top_k=4, text=text, tokens=256, length=32
    )
    assert (made.family, made.d_expert, made.shared_width) == ("mixtura", 8, 16)
    assert made.beside is not None
    assert made.beside.largest < 1e-4
    assert made.balance[0].busiest == pytest.approx(1.0)
    own = load_own_model(tmp_path / "out")
    torch.testing.assert_close(logits_of(own), logits_of(dense_model("qwen3")), atol=2e-5, rtol=1e-5)
    router = own.model.blocks[0].router
    torch.testing.assert_close(router.gate.norm(dim=1), torch.ones(4))
    assert not router.scale.any()
