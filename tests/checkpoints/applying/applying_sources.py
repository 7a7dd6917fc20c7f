"""What the checkpoints of these tests are made of, and comparing directories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

MakeSource = Callable[..., Path]


def add_side_files(folder: Path) -> None:
    """What lies beside the weights of a model from the hub: to be copied, replaced or left."""
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (folder / "LICENSE").write_text("Do what is right.")
    (folder / "NOTICE.txt").write_text("Made by many.")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n\n# The source\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "training_args.bin").write_bytes(b"\x80\x04K\x01.")
    (folder / "disguised.json").write_bytes(b"\x80\x04K\x01.")
    (folder / "plan.json").write_text("{}")


def folder_digest(folder: Path) -> str:
    """A digest of every file's name and bytes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def random_bytes(shape: tuple[int, ...], low: int, high: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def to_fp8(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = weight.shape
    padded = torch.zeros(-(-rows // block) * block, -(-cols // block) * block)
    padded[:rows, :cols] = weight
    tiles = padded.view(padded.shape[0] // block, block, -1, block)
    scale = tiles.abs().amax((1, 3)).clamp(min=1e-6) / 448
    codes = (tiles / scale[:, None, :, None]).view(padded.shape)[:rows, :cols]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def set_quantization(folder: Path, quantization: dict[str, object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = quantization
    path.write_text(json.dumps(config))
