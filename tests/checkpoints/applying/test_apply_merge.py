"""Merged experts: stored once, chosen apart; a group's output is that of experts tied to their average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_plans import save_source, write
from torch import Tensor

from mixtura.checkpoints.apply import planned_num_bytes
from mixtura.checkpoints.applying.merging import best_order, merged_expert, reordered
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.summary import summarize
from mixtura.checkpoints.view import open_model
from mixtura.checkpoints.viewing.records import ExpertWeights
from mixtura.errors import UserError
from mixtura.running.loading import load
from mixtura.running.stream import Streamed
from mixtura.types import Drop, Merge, Plan, Quantize

IDS = torch.arange(48).view(3, 16) + 5
# Softmax with and without renormalising, sigmoid with bias and groups, shared experts, biases, a hybrid.
FAMILIES = [
    "qwen3_moe",
    "gpt_oss",
    pytest.param("mixtral", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", marks=pytest.mark.slow),
    pytest.param("qwen2_moe", marks=pytest.mark.slow),
    pytest.param("granitemoehybrid", marks=pytest.mark.slow),
]


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits = model(input_ids=IDS).logits
    assert isinstance(logits, Tensor)
    return logits


def merges(source: Path, *, aligned: bool = False) -> list[Merge]:
    """Two groups in every layer, one of three with unlike shares."""
    return [
        merge
        for layer in open_model(source).layers
        for merge in (
            Merge(layer.index, (5, 1, 2), (0.5, 0.3, 0.2), aligned),
            Merge(layer.index, (0, 7), (0.5, 0.5), aligned),
        )
    ]


def tied(source: Path, groups: list[Merge]) -> Any:
    """The source in memory with every member replaced by the average of its group, in plain tensors."""
    model = load(source)
    view = open_model(model)
    for group in groups:
        layer = view.layer(group.layer)
        module = model.get_submodule(layer.name)
        for name in layer.layout.parameters:
            stack = getattr(module, name)
            average = sum(
                share * stack[e].float() for e, share in zip(group.experts, group.shares, strict=True)
            )
            with torch.no_grad():
                for expert in group.experts:
                    stack[expert] = average.to(stack.dtype)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_is_its_average_under_every_number(family: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family)
    groups = merges(source)
    out = write(source, tmp_path / "out", *groups)
    expected = logits_of(tied(source, groups))
    torch.testing.assert_close(logits_of(load(out)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        logits_of(Streamed(open_checkpoint(out)).model), expected, rtol=1e-4, atol=1e-5
    )
    for layer in open_checkpoint(out).layers:
        assert layer.num_experts == 8
        for group in groups:
            if group.layer == layer.index:
                first = layer.native_expert(group.experts[0])
                for expert in group.experts[1:]:
                    assert all(
                        torch.equal(one, other)
                        for one, other in zip(layer.native_expert(expert), first, strict=True)
                        if one is not None
                    )


def test_bytes_are_those_predicted_and_three_experts_a_layer_fewer(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    groups = merges(source)
    plan = Plan(checkpoint_digest(source), tuple(groups))
    assert Plan.from_json(plan.to_json()) == plan
    before, predicted = open_checkpoint(source), planned_num_bytes(plan, source)
    saved = sum(3 * layer.expert_num_bytes for layer in before.layers)
    assert before.num_bytes - predicted == saved
    out = write(source, tmp_path / "out", *groups)
    held = 0
    for path in out.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            held += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert held == predicted == open_checkpoint(out).num_bytes
    assert sum(summarize(open_checkpoint(out)).stored_as.values()) == held
    assert "merged 5+1+2, 0+7" in (out / "README.md").read_text()
    # In memory, too, a group is there once.
    assert load(out).get_memory_footprint() < load(source).get_memory_footprint() - saved / 2


def test_merged_dropped_and_rounded_together(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    groups = merges(source)
    layers = [layer.index for layer in open_model(source).layers]
    drops = [Drop(index, (3,)) for index in layers]
    stored = [Quantize(index, e, "round_to_nearest", {"bits": 8}) for index in layers for e in (5, 0, 4, 6)]
    out = write(source, tmp_path / "out", *groups, *drops, *stored)
    view = open_checkpoint(out)
    assert [layer.num_experts for layer in view.layers] == [7] * len(layers)
    whole = write(source, tmp_path / "whole", *groups, *drops)
    assert (logits_of(load(out)) - logits_of(load(whole))).abs().mean() < 0.01
    assert view.num_bytes < open_checkpoint(whole).num_bytes
    # Before the drop these were experts 5, 1 and 2.
    for layer in view.layers:
        assert torch.equal(layer.native_expert(4).up, layer.native_expert(1).up)
        assert torch.equal(layer.native_expert(4).up, layer.native_expert(2).up)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_planted_order_of_features_is_found(family: str, tmp_path: Path) -> None:
    layer = open_model(save_source(tmp_path / "source", family)).layers[0]
    weights = layer.expert(3)
    order = torch.randperm(len(weights.up), generator=torch.Generator().manual_seed(0))
    shuffled = reordered(weights, order)
    assert not torch.equal(shuffled.up, weights.up)
    back = reordered(shuffled, best_order(weights, shuffled))
    for name, tensor in weights.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)
    native = ExpertWeights.from_native(weights.to_native(layer.layout), layer.layout)
    assert torch.equal(native.up, weights.up)


def test_aligned_experts_are_averaged_in_the_first_ones_order(tmp_path: Path) -> None:
    layer = open_model(save_source(tmp_path / "source", "qwen3_moe")).layers[0]
    merge = Merge(layer.index, (5, 1), (0.75, 0.25), aligned=True)
    first, other = layer.expert(5), layer.expert(1)
    size = len(first.up)
    # By its definition: of all orders the one nearest to the first; none that swaps two features is nearer.
    order = best_order(first, other)
    assert sorted(order.tolist()) == list(range(size))

    def distance(chosen: Tensor) -> float:
        moved = reordered(other, chosen)
        pairs = zip(first.tensors().values(), moved.tensors().values(), strict=True)
        return sum(float((one - two).square().sum()) for one, two in pairs)

    best = distance(order)
    for i in range(size):
        for j in range(i):
            swapped = order.clone()
            swapped[[i, j]] = order[[j, i]]
            assert distance(swapped) >= best - 1e-4
    assert best < distance(torch.arange(size))
    expected = 0.75 * first.down + 0.25 * reordered(other, order).down
    made = ExpertWeights.from_native(merged_expert(layer, merge), layer.layout)
    torch.testing.assert_close(made.down, expected)


BAD = [
    ([Merge(0, (1,), (1.0,))], "give two or more, each once"),
    ([Merge(0, (1, 1), (0.5, 0.5))], "give two or more, each once"),
    ([Merge(0, (1, 99), (0.5, 0.5))], "names expert 99 of layer 0, which has 0 to 7"),
    ([Merge(0, (1, 2), (0.5, 0.6))], "which sum to one"),
    ([Merge(0, (1, 2), (1.0,))], "give one for each of its 2 experts"),
    ([Merge(0, (1, 2), (1.5, -0.5))], "a share below 0"),
    ([Merge(0, (1, 2), (0.5, 0.5)), Merge(0, (2, 3), (0.5, 0.5))], "merges expert 2 of layer 0 twice"),
    ([Merge(0, (1, 2), (0.5, 0.5)), Drop(0, (2,))], "both drops and merges expert 2"),
    (
        [Merge(0, (1, 2), (0.5, 0.5)), Quantize(0, 2, "round_to_nearest", {"bits": 4})],
        "stored as the first of its group; quantize that one",
    ),
]


@pytest.mark.parametrize(("actions", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_merges_are_refused(actions: list[Any], said: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    with pytest.raises(UserError, match=said):
        write(source, tmp_path / "out", *actions)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
