"""Skeletons: everything of a model but its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from tiny_plans import save_source, save_uneven

from mixtura.checkpoints.skeleton import build, empty_experts, open_checkpoint, read_slot
from mixtura.checkpoints.slots import slots


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "jamba", "qwen3_next"])
def test_it_has_every_weight_on_meta_and_every_computed_buffer(family: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family)
    model = build(open_checkpoint(source))
    real = tiny_model(family)
    assert all(parameter.is_meta for parameter in model.parameters())
    stored = set(model.state_dict())
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    expected = {name: buffer for name, buffer in real.named_buffers() if name not in stored}
    assert computed.keys() == expected.keys()
    assert all(torch.equal(buffer, expected[name]) for name, buffer in computed.items())
    assert {name for slot in slots(model) for name in slot.names} == stored


def test_building_leaves_random_numbers_and_the_default_dtype_alone(tmp_path: Path) -> None:
    view = open_checkpoint(save_source(tmp_path / "source", "qwen3_moe"))
    before = torch.get_rng_state()
    build(view, dtype=torch.bfloat16)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


def test_slots_are_filled_and_cleared(tmp_path: Path) -> None:
    view = open_checkpoint(save_source(tmp_path / "source", "qwen3_moe"))
    model = build(view)
    slot = next(slot for slot in slots(model) if slot.names == ("model.norm.weight",))
    value = read_slot(slot, view)
    assert value is not None
    slot.fill(value)
    norm = model.get_parameter("model.norm.weight")
    assert norm.data_ptr() == value.data_ptr()
    assert norm.requires_grad
    slot.clear()
    assert model.get_parameter("model.norm.weight").is_meta


def test_emptied_experts_keep_their_shapes(tmp_path: Path) -> None:
    view = open_checkpoint(save_source(tmp_path / "source", "qwen3_moe"))
    model = build(view)
    experts = empty_experts(model, view.layers[0])
    assert list(experts.parameters()) == []
    assert experts.down_proj.is_meta
    assert experts.down_proj.shape[0] == 8


def test_blocks_of_uneven_layers_have_the_experts_that_are_stored(tmp_path: Path) -> None:
    _, uneven = save_uneven(tmp_path, "qwen3_moe")
    view = open_checkpoint(uneven)
    model = build(view)
    for layer in view.layers:
        assert model.get_parameter(f"{layer.name}.down_proj").shape[0] == layer.num_experts
        assert model.get_parameter(f"{layer.router_name}.weight").shape[0] == layer.num_experts
        assert model.get_submodule(layer.name).config._experts_implementation == "mixtura"
