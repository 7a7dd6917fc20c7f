"""What a loaded model gets besides its weights: copies and counts, a device, attention, an adapter."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_checkpoints import run_mixtura, save_tiny
from tiny_plans import save_packed, save_source, write
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.stores import set_bits
from mixtura.checkpoints.summary import summarize
from mixtura.errors import CheckpointError, SettingError, UnsupportedModelError
from mixtura.running.loading import load
from mixtura.running.stream import Streamed
from mixtura.types import Drop, Quantize

IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits = model(input_ids=IDS).logits
    assert isinstance(logits, Tensor)
    return logits


def test_a_model_that_has_run_is_copied_and_pickled(tmp_path: Path) -> None:
    source, packed = save_packed(tmp_path, "qwen3_moe")
    for path in (source, packed):
        model = load(path)
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        expected = logits_of(model)
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        assert twin.num_parameters() == again.num_parameters() == model.num_parameters()
        for parameter in model.parameters():
            parameter.data.zero_()
        for module in model.modules():
            if hasattr(module, "mixtura_store"):
                module.mixtura_store._memory.zero_()
        assert torch.equal(logits_of(twin), expected)
        assert torch.equal(logits_of(again), expected)


def test_a_copy_reads_at_bits_of_its_own(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    nested = [Quantize(layer, e, "nested", {}) for layer in range(3) for e in range(8)]
    model = load(write(source, tmp_path / "nested", *nested))
    expected = logits_of(model)
    twin = copy.deepcopy(model)
    set_bits(twin, 2)
    assert not torch.equal(logits_of(twin), expected)
    assert torch.equal(logits_of(model), expected)
    set_bits(twin, None)
    assert torch.equal(logits_of(twin), expected)


def test_the_state_of_a_packed_model_holds_its_experts(tmp_path: Path) -> None:
    source, packed = save_packed(tmp_path, "qwen3_moe")
    model = load(packed)
    state = model.state_dict()
    stored = sum(tensor.nbytes for tensor in load_file(packed / "model.safetensors").values())
    assert sum(tensor.nbytes for tensor in state.values()) >= stored
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other, expected = load(packed), logits_of(model)
    for module in other.modules():
        if hasattr(module, "mixtura_store"):
            module.mixtura_store._memory.zero_()
    assert not torch.equal(logits_of(other), expected)
    other.load_state_dict(torch.load(file))
    assert torch.equal(logits_of(other), expected)
    # As many bytes, but other experts in 8 and in 4 bits.
    widths = [
        Quantize(layer, expert, "round_to_nearest", {"bits": (4, 8, 2)[expert % 4]})
        for layer in range(3)
        for expert in (0, 1, 2, 4, 5, 6)
    ]
    swapped = load(write(source, tmp_path / "swapped", *widths))
    with pytest.raises(RuntimeError, match="another plan"):
        swapped.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(
            {name: tensor for name, tensor in state.items() if not name.endswith("experts.packed")}
        )


def test_a_packed_model_counts_all_of_its_parameters(tmp_path: Path) -> None:
    source, packed = save_packed(tmp_path, "gpt_oss")
    model, plain = load(packed), load(source)
    assert model.num_parameters() == plain.num_parameters()
    without = plain.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(exclude_embeddings=True) == without
    assert model.num_parameters(only_trainable=True) < plain.num_parameters(only_trainable=True)
    stored = sum(tensor.nbytes for tensor in load_file(packed / "model.safetensors").values())
    assert stored <= model.get_memory_footprint() < plain.get_memory_footprint()


@pytest.mark.parametrize("device", [None, "cpu", "auto", torch.device("cpu"), {"": "cpu"}])
def test_a_model_is_put_on_one_device(device: Any, tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, "qwen3_moe")
    assert load(packed, device_map=device).device.type == "cpu"


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("nowhere", "names 'nowhere', which is no device here"),
        ("cuda:99", "names 'cuda:99', which is no device here"),
        ("meta", "holds no numbers"),
        ({"model": "cpu", "lm_head": "disk"}, "puts a model on one device"),
    ],
)
def test_devices_that_are_not_there_are_named(device: Any, words: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    with pytest.raises(SettingError, match=words):
        load(source, device_map=device)


def test_attention_can_be_chosen(tmp_path: Path) -> None:
    source, packed = save_packed(tmp_path, "qwen3_moe")
    for path in (source, packed):
        eager = load(path, attn_implementation="eager")
        assert eager.config._attn_implementation == "eager"
        torch.testing.assert_close(logits_of(eager), logits_of(load(path)), rtol=1e-4, atol=1e-5)
        with pytest.raises(SettingError, match="attn_implementation 'egaer' cannot be had"):
            load(path, attn_implementation="egaer")


def add_adapter(path: Path) -> Tensor:
    """Write a random adapter beside the weights; gives what the adapted model computes."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny_model("qwen3_moe"), config).eval()
    adapted.save_pretrained(path)
    return logits_of(adapted)


def test_an_adapter_beside_the_weights_is_loaded_with_them(tmp_path: Path) -> None:
    source, packed = save_packed(tmp_path, "qwen3_moe")
    plain = {path: logits_of(load(path)) for path in (source, packed)}
    expected = add_adapter(source)
    theirs = AutoModelForCausalLM.from_pretrained(source)
    torch.testing.assert_close(logits_of(load(source)), logits_of(theirs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(load(source)), expected, rtol=1e-4, atol=1e-5)
    add_adapter(packed)
    assert (logits_of(load(packed)) - expected).norm() < (plain[packed] - expected).norm()


def test_what_cannot_heed_an_adapter_refuses_it(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    add_adapter(source)
    view = open_checkpoint(source)
    with pytest.raises(UnsupportedModelError, match=r"holds an adapter \(LORA.*merge"):
        Streamed(view)
    with pytest.raises(UnsupportedModelError, match=r"holds an adapter \(LORA.*merge"):
        write(source, tmp_path / "out", Drop(0, (1,)))
    assert not list(tmp_path.glob("out*"))
    assert summarize(view).adapter == "LORA"
    shown = run_mixtura("inspect", str(source))
    assert "adapter" in shown.stdout, shown.stderr
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        load(source)


def test_an_adapter_of_another_model_is_named(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    add_adapter(source)
    file = source / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["no_such_layer"]}))
    with pytest.raises(CheckpointError, match=r"adapter \(LORA\).*does not fit"):
        load(source)


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    add_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="holds an adapter; merge"):
        open_checkpoint(tmp_path)


def test_what_cannot_heed_other_routers_refuses_them(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    (source / "router.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"other routers or balancers.*router\.json"):
        Streamed(open_checkpoint(source))
    with pytest.raises(UnsupportedModelError, match=r"other routers or balancers.*router\.json"):
        write(source, tmp_path / "out", Drop(0, (1,)))


def test_a_streamed_model_is_not_saved(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    with pytest.raises(UnsupportedModelError, match="runs from disk cannot be saved"):
        Streamed(open_checkpoint(source)).model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
