"""Giving a model back the routers and balancers that it was saved with."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mixtura.rerouting.balancing import balance
from mixtura.rerouting.core import Rerouting
from mixtura.rerouting.side_files import read_note
from mixtura.rerouting.swapping import set_router


def load_router(model: nn.Module, directory: str | Path) -> Rerouting:
    """Set the routers and balancers that a model was saved with, and give them their tensors.

    ``model`` is what ``from_pretrained(directory)`` made, an ordinary model of the family. To go on with
    the training of a checkpoint, hand the result's ``callback`` to the new `Trainer`.

    Raises:
        CheckpointError: the directory has no side files, or damaged ones.
    """
    note = read_note(Path(directory))
    for swap in note.routers:
        set_router(model, swap.router, layers=list(swap.layers), train=True, **swap.settings)
    if note.balancers:
        balance(model, list(note.balancers))
    rerouting = Rerouting.of(model)
    rerouting.load(directory)
    return rerouting
