"""What gets a type in a GGUF file, what it takes, and that decoded values land where they came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_sources import CONFIGS, save_source
from tiny_checkpoints import save_tiny
from torch import Tensor

from mixtura.checkpoints.gguf.libraries import llama_library
from mixtura.checkpoints.gguf.tensors import FileTensor
from mixtura.checkpoints.gguf.types import TypeRules
from mixtura.checkpoints.gguf.write import plan_file
from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.errors import UnknownNameError, UnsupportedModelError, UserError
from mixtura.fitting import Request, estimate_fit, fit
from mixtura.fitting.forms.gguf.stream import changed_stream
from mixtura.fitting.forms.gguf.units import (
    PALETTE,
    Unit,
    blocks_of,
    choice_map_of,
    least_bytes,
    parts_of,
    sizes_of,
    units_of,
)
from mixtura.running.stream import Streamed

gguf: Any = pytest.importorskip("gguf", reason="the package gguf is not installed; it is in mixtura[gguf]")


def opened(path: Path) -> tuple[CheckpointView, tuple[FileTensor, ...], tuple[Unit, ...]]:
    view = open_checkpoint(path)
    tensors = plan_file(view, "m", TypeRules([]), calibrated=True).tensors
    return view, tensors, units_of(view, tensors)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_decoded_lands_where_it_came_from(family: str, tmp_path: Path) -> None:
    """The model made of its own values is itself; of doubled values it is transformers' with doubled ones."""
    view, _, units = opened(save_source(tmp_path / "model", family))
    ids = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(0))

    def hidden(factor: float) -> Tensor:
        def read(tensor: FileTensor, number: int) -> Tensor:
            return factor * tensor.pieces[number].read().float()

        rounded = [(unit, unit.at(1)) for unit in units]
        return changed_stream(view, rounded, read, torch.float32).hidden(ids)

    plain = Streamed(view, dtype=torch.float32).hidden(ids)
    assert torch.equal(hidden(1.0), plain)
    assert not torch.allclose(hidden(1.1), plain)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "olmoe tied"])
def test_each_tensor_alone_changes_the_model(family: str, tmp_path: Path) -> None:
    view, _, units = opened(save_source(tmp_path / "model", family))
    ids = torch.arange(3, 300).reshape(1, -1)[:, :120]
    streamed = Streamed(view, dtype=torch.float32)
    plain = streamed.hidden(ids)

    def noisy(tensor: FileTensor, number: int) -> Tensor:
        value = tensor.pieces[number].read().float()
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
        return value + 0.3 * noise

    for unit in units:
        if unit.name != "output":
            made = changed_stream(view, [(unit, unit.at(1))], noisy, torch.float32).hidden(ids)
            assert not torch.allclose(made, plain, atol=1e-5), unit.name


def test_a_head_that_is_the_embedding_has_its_type(tmp_path: Path) -> None:
    _, _, tied = opened(save_source(tmp_path / "tied", "olmoe tied"))
    both = next(unit for unit in tied if unit.name == "token_embd")
    assert [tensor.name for tensor in both.tensors] == ["token_embd.weight", "output.weight"]
    assert both.num_bytes(1) == 2 * both.at(1)[0].num_bytes
    _, _, own = opened(save_source(tmp_path / "own", "olmoe"))
    assert {"token_embd", "output"} <= {unit.name for unit in own}


def test_parts_of_one_matrix_have_types_of_their_own(tmp_path: Path) -> None:
    _, _, units = opened(save_source(tmp_path / "model", "deepseek_v2"))
    assert {"blk.0.attn_k_b", "blk.0.attn_v_b"} <= {unit.name for unit in units}


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    view, tensors, units = opened(save_source(tmp_path / "model", "qwen3_moe", torch.bfloat16))
    sizes = sizes_of(units)
    rest = sum(t.num_bytes for t in tensors if not t.may_be_rounded)
    assert rest + sizes[:, PALETTE.keep].sum() == sum(t.num_bytes for t in tensors)
    option = PALETTE.names.index("q8_0")
    planned = plan_file(view, "m", TypeRules(["*=q8_0"]), calibrated=True)
    assert rest + sizes[:, option].sum() == sum(t.num_bytes for t in planned.tensors)
    assert least_bytes(units) <= sizes[:, PALETTE.stored].sum(0).min()
    # Rows of 64 weights are no whole blocks of 256.
    experts = next(unit for unit in units if unit.is_experts)
    assert experts.at(PALETTE.names.index("q4_k"))[0].kind.name == "q5_0"


def test_types_that_need_importance_are_not_for_tables_that_are_looked_up(tmp_path: Path) -> None:
    _, _, units = opened(save_source(tmp_path / "model", "qwen3_moe", hidden_size=256))
    table = next(unit for unit in units if unit.name == "token_embd")
    assert not table.allows(PALETTE.names.index("iq2_xxs"))
    assert table.allows(PALETTE.names.index("q2_k"))


@pytest.mark.parametrize("most", [1, 10, 1000])
def test_blocks_are_of_one_kind_and_hold_each_tensor_once(most: int, tmp_path: Path) -> None:
    _, _, units = opened(save_source(tmp_path / "model", "qwen2_moe"))
    masks = blocks_of(units, most)
    assert (np.sum(masks, axis=0) == 1).all()
    kinds = len({unit.kind for unit in units})
    assert kinds <= len(masks) <= max(kinds, most)
    for mask in masks:
        assert len({unit.kind for unit, here in zip(units, mask, strict=True) if here}) == 1
    assert parts_of(units).layers.min() == -1


def test_the_map_of_types_has_a_row_for_each_layer(tmp_path: Path) -> None:
    _, _, units = opened(save_source(tmp_path / "model", "deepseek_v3"))
    found = choice_map_of(units, {unit.name: "q8_0" for unit in units})
    assert list(found) == ["token_embd", "0", "1", "output"]
    assert len({len(row) for row in found.values()}) == 1
    # The first layer has no routed experts.
    kinds = list(dict.fromkeys(unit.kind for unit in units))
    assert found["0"][kinds.index("ffn_gate_exps")] == ""


def request_of(source: Path, out: Path) -> Request:
    return Request(model=source, out=out, form="gguf", model_memory_bytes=1 << 20)


def test_a_family_that_llama_cpp_has_not_is_refused_first(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "dots1")
    with pytest.raises(UnsupportedModelError, match=r"dots1.*qwen3_moe, .*mixtral"):
        fit(request_of(source, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_llama_cpps_library_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_source(tmp_path / "model", "qwen3_moe")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    llama_library.cache_clear()
    try:
        with pytest.raises(UserError, match=r"mixtura\[llama\]"):
            fit(request_of(source, tmp_path / "out"))
    finally:
        llama_library.cache_clear()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_not_for_this_format_is_said(tmp_path: Path) -> None:
    request = request_of(save_source(tmp_path / "model", "qwen3_moe"), tmp_path / "out")
    with pytest.raises(UnknownNameError, match="did you mean 'gguf'"):
        fit(replace(request, form="ggf"))
    with pytest.raises(UnknownNameError, match="did you mean 'gguf'"):
        estimate_fit(replace(request, form="ggf"))


def test_an_estimate_has_the_sizes_that_files_have(tmp_path: Path) -> None:
    source = save_source(tmp_path / "model", "qwen3_moe", torch.bfloat16)
    request = replace(request_of(source, tmp_path / "out"), context=64, calibration_tokens=256)
    found = estimate_fit(request)
    plans = {plan.name: plan for plan in found.options}
    for name in ("unchanged", "q8_0"):
        rules = TypeRules([] if name == "unchanged" else [name])
        assert (
            plans[name].weights_bytes
            == plan_file(open_checkpoint(source), "model", rules, calibrated=True).num_bytes
        )
    unchanged, small = plans["unchanged"], plans["smallest"]
    assert small.weights_bytes == min(plan.weights_bytes for plan in plans.values())
    saved = unchanged.weights_bytes - small.weights_bytes
    assert abs(unchanged.accounted_bytes - small.accounted_bytes - saved) < 64 * len(plans)
    assert small.accounted_bytes == found.smallest_bytes
    assert all(plan.fits == (plan.accounted_bytes <= 1 << 20) for plan in plans.values())
    assert all(plan.tokens_per_second is None for plan in plans.values())
    assert 0 < small.active_bytes < small.weights_bytes
    assert found.seconds > 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_estimate_says_where_the_library_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_source(tmp_path / "model", "qwen3_moe")
    monkeypatch.setattr("mixtura.fitting.forms.gguf.estimate.llama_library", lambda: None)
    found = estimate_fit(replace(request_of(source, tmp_path / "out"), context=64, calibration_tokens=256))
    assert any("pip install 'mixtura[llama]'" in note for note in found.notes)
