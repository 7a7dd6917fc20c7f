"""Plans for tiny checkpoints of eight experts a layer, and applying them."""

from __future__ import annotations

from pathlib import Path

from families import tiny_model

from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.view import open_model
from mixtura.types import Action, Drop, Plan, Quantize

WIDTHS = (8, 4, 2, None)


def write(source: Path, out: Path, *actions: Action) -> Path:
    """Apply actions to a checkpoint."""
    apply_plan(Plan(checkpoint_digest(source), actions), source, out, progress=False)
    return out


def mixed_widths(source: Path) -> list[Action]:
    """Experts of every layer in 8, 4 and 2 bits and as they are, by turns."""
    return [
        Quantize(layer.index, expert, "round_to_nearest", {"bits": bits})
        for layer in open_model(source).layers
        for expert in range(layer.num_experts)
        if (bits := WIDTHS[expert % len(WIDTHS)]) is not None
    ]


def uneven_drops(source: Path) -> dict[int, tuple[int, ...]]:
    """Experts to drop from each layer but the last: more in later layers, as many of each half."""
    layers = open_model(source).layers
    return {
        layer.index: tuple(e for pair in range(number + 1) for e in (pair, 4 + pair))
        for number, layer in enumerate(layers[:-1])
    }


def save_source(path: Path, family: str) -> Path:
    """A tiny model of a family on disk."""
    tiny_model(family).save_pretrained(path)
    return path


def save_packed(path: Path, family: str) -> tuple[Path, Path]:
    """A tiny model of a family, and the same with experts in mixed widths: both directories."""
    source = save_source(path / "source", family)
    return source, write(source, path / "packed", *mixed_widths(source))


def save_uneven(path: Path, family: str) -> tuple[Path, Path]:
    """A tiny model of a family, and the same with other numbers of experts in its layers."""
    source = save_source(path / "source", family)
    drops = [Drop(layer, experts) for layer, experts in uneven_drops(source).items()]
    return source, write(source, path / "uneven", *drops)
