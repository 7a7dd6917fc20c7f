"""Experts stored once and read at 8, 4 or 2 bits: written, loaded, run, streamed, accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from running.test_loading import logits_of
from tiny_plans import save_source, write

import mixtura
from mixtura.checkpoints.nesting import widths_of, widths_of_plan
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.stores import PackedStore
from mixtura.checkpoints.view import open_model
from mixtura.errors import UserError
from mixtura.kernels import isas, using
from mixtura.running.loading import load
from mixtura.running.memory import account
from mixtura.running.stream import Streamed
from mixtura.types import Plan, Quantize

SETTINGS = {"group_size": 16}


def save_nested(path: Path, family: str = "qwen3_moe", *, whole: bool = True) -> Path:
    """A tiny model whose experts are nested; unless ``whole`` some are not, or hold less."""
    source = save_source(path / "source", family)
    experts = [(layer.index, e) for layer in open_model(source).layers for e in range(layer.num_experts)]
    actions: list[Quantize] = []
    for index, expert in experts:
        if whole or expert % 4 == 0:
            actions.append(Quantize(index, expert, "nested", SETTINGS))
        elif expert % 4 == 1:
            actions.append(Quantize(index, expert, "nested", {**SETTINGS, "bits": 4}))
        elif expert % 4 == 2:
            actions.append(Quantize(index, expert, "round_to_nearest", {"bits": 4}))
    return write(source, path / "nested", *actions)


def stores_of(model: Any) -> list[PackedStore]:
    return [module.mixtura_store for module in model.modules() if hasattr(module, "mixtura_store")]


def expert_bytes(path: Path, bits: Any) -> int:
    """Bytes of the experts' tensors that are read."""
    view = open_checkpoint(path, bits=bits)
    names = [
        n for layer in view.layers for e in range(layer.num_experts) for n in layer.expert_tensor_names(e)
    ]
    return sum(view.entries[name].num_bytes for name in names)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_copy_runs_at_every_width(family: str, tmp_path: Path) -> None:
    path = save_nested(tmp_path, family)
    true = open_model(tmp_path / "source").layers[0].native_expert(1).up
    model = load(path)
    errors = []
    for bits in (8, 4, 2):
        mixtura.set_bits(model, bits)
        assert all(store.bits == (bits,) * store.num_experts for store in stores_of(model))
        found = logits_of(model)
        errors.append(float((stores_of(model)[0].get(1, true.dtype).up - true).norm() / true.norm()))
        # The same by PyTorch, from what is loaded at that width alone, and streamed from disk.
        with using("torch"):
            decoded = logits_of(model)
            assert torch.equal(decoded, logits_of(load(path, bits=bits)))
            assert torch.equal(decoded, logits_of(Streamed(open_checkpoint(path, bits=bits)).model))
        torch.testing.assert_close(found, decoded, rtol=1e-4, atol=1e-5)
        if isas():
            assert all(store.native_layer() is not None for store in stores_of(model))
    assert errors[0] < 0.01 < errors[1] < 0.1 < errors[2] < 0.4
    mixtura.set_bits(model, None)
    assert all(set(store.bits) == {8} for store in stores_of(model))


def test_fewer_bits_are_less_to_read_and_to_keep(tmp_path: Path) -> None:
    path = save_nested(tmp_path)
    whole, half, quarter = (expert_bytes(path, bits) for bits in (8, 4, 2))
    layers = open_model(path).layers
    num = sum(layer.num_experts * 3 * layer.shape.d_model * layer.shape.d_expert for layer in layers)
    scales = 2 * num // SETTINGS["group_size"]
    # Codes of so many bits and the scales of the width; the whole copy has those of all three.
    assert (half, quarter) == (num // 2 + scales, num // 4 + scales)
    assert whole == num + scales
    assert sum(
        e.num_bytes for n, e in open_checkpoint(path).entries.items() if ".up." in n or ".down." in n
    ) == (num + 3 * scales)
    kept = [sum(store.num_bytes for store in stores_of(load(path, bits=bits))) for bits in (8, 4, 2)]
    assert kept == [whole, half, quarter]
    accounts = [account(open_checkpoint(path, bits=bits), 64).expert_bytes for bits in (8, 4, 2)]
    assert accounts == kept
    model = load(path)
    (store, *_) = stores_of(model)
    before = store.read_bytes[3]
    other = store.at({(store.layer.index, 3): 2})
    assert other.read_bytes[3] < before / 2
    assert other.read_bytes[4] == store.read_bytes[3] == before
    assert (
        other.tensor(f"{store.layer.name}.3.up.codes_2").data_ptr()
        == store.tensor(f"{store.layer.name}.3.up.codes_2").data_ptr()
    )


def test_widths_by_expert(tmp_path: Path) -> None:
    path = save_nested(tmp_path)
    index = open_model(path).layers[1].index
    wanted = {(index, 0): 2, (index, 5): 4}
    model, narrow = load(path), load(path, bits=wanted)
    mixtura.set_bits(model, wanted)
    first, second = stores_of(model)[:2]
    assert set(first.bits) == {8}
    assert second.bits == (2, 8, 8, 8, 8, 4, 8, 8)
    with using("torch"):
        assert torch.equal(logits_of(model), logits_of(narrow))
    with pytest.raises(UserError, match="cannot be read at 8 bits: what is here of it holds only 2"):
        mixtura.set_bits(narrow, {(index, 0): 8})
    # What is refused changes nothing.
    assert stores_of(narrow)[1].bits == second.bits


def test_a_plan_says_at_what_widths_to_read(tmp_path: Path) -> None:
    path = save_nested(tmp_path)
    index = open_model(path).layers[0].index
    actions = tuple(Quantize(index, e, "round_to_nearest", {"bits": 8 >> e}) for e in range(3))
    model = load(path, bits=widths_of_plan(Plan("sha256:0", actions)))
    assert stores_of(model)[0].bits == (8, 4, 2, *[8] * 5)


def test_experts_stored_in_other_ways_stay_as_they_are(tmp_path: Path) -> None:
    path = save_nested(tmp_path, whole=False)
    model = load(path, bits=4)
    assert stores_of(model)[0].bits == (4, 4, None, None) * 2
    assert [widths_of(record) for record in stores_of(load(path))[0].records[:4]] == [
        (8, 4, 2),
        (4, 2),
        (),
        (),
    ]
    torch.testing.assert_close(
        logits_of(model), logits_of(Streamed(open_checkpoint(path, bits=4)).model), rtol=1e-4, atol=1e-5
    )
    index = open_model(path).layers[0].index
    with pytest.raises(UserError, match=r"holds no widths to choose from .*nested"):
        load(path, bits={(index, 2): 4})
    with pytest.raises(UserError, match=f"layer {index} has no expert 9"):
        load(path, bits={(index, 9): 4})


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    path = save_nested(tmp_path)
    with pytest.raises(UserError, match="must be 8, 4 or 2, got 3"):
        load(path, bits=3)
    with pytest.raises(UserError, match="write it with the quantizer nested"):
        load(tmp_path / "source", bits=4)
    with pytest.raises(UserError, match="write it with the quantizer nested"):
        mixtura.set_bits(load(tmp_path / "source"), 4)


def test_it_generates(tmp_path: Path) -> None:
    path = save_nested(tmp_path)
    ids = torch.arange(5, 9)[None]
    for bits in (None, 2):
        model = load(path, bits=bits)
        made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert made.shape == (1, 10)
