"""Weights that a training sets to zero as it goes, by a method of the kind sparsifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from mixtura.errors import CheckpointError
from mixtura.methods import create
from mixtura.methods.sparsifiers import Sparsifier, Training
from mixtura.modeling.plan import Choice

_FILE = "masks.safetensors"
_LAYERS = ".layers."
# Routers are small and decide everything.
_LEFT_OUT = ".router."
_MOMENT = "exp_avg"


def read_sparsity(value: Any) -> Sparsifier:
    """The sparsifier that a name, or a mapping with a name and settings, stands for.

    Raises:
        UserError: it is neither, or there is no such method or setting.
    """
    choice = Choice.read(value, "sparsity")
    made: Sparsifier = create("sparsifiers", choice.name, **choice.settings)
    return made


@final
class Sparsity:
    """Masks over the matrices of a model's layers, all but its routers'.

    Args:
        model: what is trained.
        sparsifier: the method.
        num_steps: of the whole training.
    """

    def __init__(self, model: Any, sparsifier: Sparsifier, num_steps: int) -> None:
        self._sparsifier, self._num_steps = sparsifier, num_steps
        self._matrices: dict[str, Tensor] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and _LAYERS in name and _LEFT_OUT not in name
        }
        self._masks = sparsifier.start({name: one.detach() for name, one in self._matrices.items()})
        self._apply(None)

    @property
    def density(self) -> float:
        """The share of the matrices' weights that is trained."""
        left = sum(int(mask.sum()) for mask in self._masks.values())
        return left / sum(mask.numel() for mask in self._masks.values())

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Any) -> None:
        """Zero what the optimizer changed of weights that are gone; choose anew where that is due."""
        self._apply(optimizer)
        if not self._sparsifier.due(step, self._num_steps):
            return
        weights = {name: one.detach() for name, one in self._matrices.items()}
        gradients = {
            name: torch.zeros_like(one) if one.grad is None else one.grad
            for name, one in self._matrices.items()
        }
        training = Training(weights, gradients, self._masks, step, self._num_steps)
        self._masks = self._sparsifier.masks(training)
        self._apply(optimizer)

    @torch.no_grad()
    def _apply(self, optimizer: Any) -> None:
        for name, parameter in self._matrices.items():
            parameter.mul_(self._masks[name])
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            if _MOMENT in state:
                state[_MOMENT].mul_(self._masks[name])

    def save(self, folder: Path) -> None:
        """Write the masks beside a checkpoint."""
        save_file({name: mask.contiguous() for name, mask in self._masks.items()}, str(folder / _FILE))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it has no masks of this model.
        """
        file = folder / _FILE
        found = load_file(str(file)) if file.is_file() else {}
        if {name: mask.shape for name, mask in found.items()} != {n: m.shape for n, m in self._masks.items()}:
            raise CheckpointError(f"{file} has no masks of this model; train from the start")
        self._masks = {name: found[name].to(mask.device) for name, mask in self._masks.items()}


@final
class SparsityCallback(TrainerCallback):  # type: ignore[misc]
    """Applies masks after each step of the optimizer, while gradients are still there."""

    def __init__(self, sparsity: Sparsity) -> None:
        self._sparsity = sparsity

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step, before it is counted."""
        optimizer = kwargs["optimizer"]
        self._sparsity.after_step(state.global_step + 1, getattr(optimizer, "optimizer", optimizer))
