"""Tiny checkpoints stored as their families' originals are: DeepSeek's in FP8, gpt-oss in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from families import model_class, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

_BLOCK = 16


def save_fp8(path: Path) -> Path:
    """A tiny deepseek_v3 with every projection in FP8, a scale for each 16 by 16 values."""
    _save(path, "deepseek_v3", moe_intermediate_size=32)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("proj.weight", "_with_mqa.weight"))]:
        tensors[name], tensors[f"{name}_scale_inv"] = _to_fp8(tensors[name].float())
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    _mark(path, {"quant_method": "fp8", "weight_block_size": [_BLOCK, _BLOCK]})
    return path


def save_mxfp4(path: Path) -> Path:
    """A tiny gpt_oss with its experts in MXFP4, all of a layer in one tensor."""
    _save(path, "gpt_oss", intermediate_size=32)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        shape = (experts, rows, cols // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
        tensors.update({f"{name}_blocks": blocks, f"{name}_scales": scales})
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    _mark(path, {"quant_method": "mxfp4"})
    return path


def _save(path: Path, family: str, **sizes: int) -> None:
    config = tiny_config(family)
    for name, size in sizes.items():
        setattr(config, name, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model_class(family)._from_config(config, dtype=torch.bfloat16).save_pretrained(path)


def _to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    padded = torch.zeros(-(-rows // _BLOCK) * _BLOCK, -(-cols // _BLOCK) * _BLOCK)
    padded[:rows, :cols] = weight
    tiles = padded.view(padded.shape[0] // _BLOCK, _BLOCK, -1, _BLOCK)
    scale = tiles.abs().amax((1, 3)).clamp(min=1e-6) / 448
    codes = (tiles / scale[:, None, :, None]).view(padded.shape)[:rows, :cols]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def _mark(path: Path, quantization: dict[str, object]) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization}))


def write_safetensors(file: Path, entries: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file of any types, which the library's own writer may not know."""
    header, content = {}, b""
    for name, (kind, shape, data) in entries.items():
        header[name] = {
            "dtype": kind,
            "shape": shape,
            "data_offsets": [len(content), len(content) + len(data)],
        }
        content += data
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)


def raw_entries(tensors: dict[str, Tensor]) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: ("F32", list(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }
