"""Large checkpoints: opened from headers alone, read without mapping files into memory."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from families import tiny_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from mixtura.checkpoints.view import open_model
from mixtura.checkpoints.viewing.meta import build_meta


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """A bfloat16 safetensors file of zeros that takes no room on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


@pytest.fixture(scope="module")
def qwen3_30b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-30B-A3B's names and shapes: 48 layers of 128 experts, 18,867 tensors, 61 GB."""
    config = Qwen3MoeConfig(
        num_hidden_layers=48, num_experts=128, head_dim=128, num_key_value_heads=4, num_attention_heads=32
    )
    path = tmp_path_factory.mktemp("large")
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(path)
    shapes: dict[str, list[int]] = {}
    for name, value in build_meta(Qwen3MoeForCausalLM, config).state_dict().items():
        shape = list(value.shape)
        stem = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for expert in range(128):
                shapes[f"{stem}.{expert}.gate_proj.weight"] = [shape[1] // 2, shape[2]]
                shapes[f"{stem}.{expert}.up_proj.weight"] = [shape[1] // 2, shape[2]]
        elif name.endswith("experts.down_proj"):
            shapes.update({f"{stem}.{expert}.down_proj.weight": shape[1:] for expert in range(128)})
        else:
            shapes[name] = shape
    write_sparse(path / "model.safetensors", shapes)
    return path


def test_opening_takes_under_a_second(qwen3_30b: Path) -> None:
    open_model(qwen3_30b)  # the first one also fills transformers' own caches
    start = time.process_time()
    view = open_model(qwen3_30b)
    seconds = time.process_time() - start
    assert len(view.tensor_names) == 18867
    assert round(view.num_bytes / 1e9) == 61
    assert [layer.index for layer in view.layers] == list(range(48))
    assert view.layers[47].expert_num_bytes == 3 * 768 * 2048 * 2
    # Type-checking every call under pytest costs as much again.
    assert seconds < 2


def test_reading_an_expert_maps_no_file(qwen3_30b: Path) -> None:
    view = open_model(qwen3_30b)
    before = resident_bytes()
    for expert in range(0, 128, 16):
        weights = view.layers[20].expert(expert)
        assert weights.up.shape == (768, 2048)
    assert resident_bytes() - before < 64 << 20
    maps = Path("/proc/self/maps").read_text()
    assert str(qwen3_30b) not in maps


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_what_is_read_is_aligned_and_ours(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    view = open_model(tmp_path)
    name = next(iter(view.tensor_names))
    tensor = view.tensor(name)
    assert tensor.data_ptr() % 16 == 0
    tensor.zero_()
    assert torch.any(view.tensor(name) != 0)
