"""Stores of experts: packed in one piece of memory, and read from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_plans import save_packed, save_source

from mixtura.checkpoints.stores import DiskStore, packed_num_bytes
from mixtura.checkpoints.view import open_model
from mixtura.kernels import ExpertTensors
from mixtura.running.packing import packed_forms, packed_store


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_packed_store_gives_what_the_disk_holds(family: str, tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, family)
    view = open_model(packed)
    for layer in view.layers:
        store = packed_store(view, layer)
        assert store is not None
        for expert in range(layer.num_experts):
            read, kept = layer.native_expert(expert), store.get(expert, torch.float32)
            for one, other in zip(read, kept, strict=True):
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)


def test_its_size_is_known_before_it_is_made(tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, "qwen3_moe")
    view = open_model(packed)
    layer = view.layers[0]
    described, store = packed_forms(view, layer), packed_store(view, layer)
    assert described is not None
    assert store is not None
    record, forms = described
    assert packed_num_bytes(form.num_bytes for form in forms) == store.num_bytes
    assert len(record.experts or ()) == store.num_experts == 8
    assert sum(form.num_bytes for form in forms) == sum(
        view.entries[name].num_bytes for expert in range(8) for name in layer.expert_tensor_names(expert)
    )


def test_plain_experts_have_no_packed_store(tmp_path: Path) -> None:
    view = open_model(save_source(tmp_path / "source", "mixtral"))
    assert packed_store(view, view.layers[0]) is None


def test_a_disk_store_reads_or_runs_what_is_given_instead(tmp_path: Path) -> None:
    view = open_model(save_source(tmp_path / "source", "qwen3_moe"))
    layer = view.layers[1]
    asked = []

    def halve(index: int, expert: int, dtype: torch.dtype) -> ExpertTensors:
        asked.append((index, expert))
        tensors = layer.native_expert(expert)
        return tensors._replace(up=tensors.up / 2).to(dtype)

    plain, halved = DiskStore(layer), DiskStore(layer, halve)
    assert torch.equal(plain.get(5, torch.float64).up / 2, halved.get(5, torch.float64).up)
    assert plain.get(5, torch.bfloat16).down.dtype == torch.bfloat16
    assert asked == [(layer.index, 5)]
