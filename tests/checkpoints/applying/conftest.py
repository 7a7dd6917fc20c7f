"""Tiny checkpoints to apply plans to, with the small files that real ones have beside the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from applying_sources import MakeSource, add_side_files, set_quantization, to_fp8
from families import model_class, tiny_config, tiny_model
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> MakeSource:
    """Makes a checkpoint directory of a tiny model of a family; the same one for the same arguments."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, shard_size: str = "1GB") -> Path:
        key = (family, shard_size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("source") / f"tiny-{family}"
            tiny_model(family).save_pretrained(made[key], max_shard_size=shard_size)
            add_side_files(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def fp8_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny deepseek_v3 stored as DeepSeek's are: FP8 in blocks, with a scale for each.

    Expert matrices have 24 rows and blocks 16, so that gate and up do not end where a block does.
    """
    folder = tmp_path_factory.mktemp("fp8") / "tiny-fp8"
    config = tiny_config("deepseek_v3")
    config.moe_intermediate_size = 24
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = model_class("deepseek_v3")._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith("proj.weight") or name.endswith("_a_proj_with_mqa.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensors[name], block=16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    set_quantization(folder, {**quantization, "weight_block_size": [16, 16]})
    return folder


@pytest.fixture(scope="session")
def mxfp4_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt_oss stored as OpenAI's are: experts in MXFP4, fused, with random codes."""
    folder = tmp_path_factory.mktemp("mxfp4") / "tiny-mxfp4"
    config = tiny_config("gpt_oss")
    config.intermediate_size = 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = model_class("gpt_oss")._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        shape = (experts, rows, cols // 32)
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (*shape, 16), dtype=torch.uint8, generator=generator
        )
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    excluded = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    set_quantization(folder, {"quant_method": "mxfp4", "modules_to_not_convert": excluded})
    return folder
