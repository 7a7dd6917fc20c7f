"""How large the inputs of every matrix are on calibration text: what llama.cpp calls an importance matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.viewing.base import LayerView
from mixtura.data.tokens import TokenBatch
from mixtura.kernels import ExpertMath
from mixtura.kernels.backend import math_of
from mixtura.running.observing.attach import attached
from mixtura.running.observing.recorder import Cursor
from mixtura.running.stream import Streamed
from mixtura.running.together import Forward, run_together

Report = Callable[[int, int], None]
OUTPUTS = "outputs"
_ROWS, _SQUARES = "rows:", "squares:"


@runtime_checkable
class KeptLayers(Protocol):
    """What the layers of a pass put out and found, kept while it goes on."""

    def read(self, number: int, call: int) -> dict[str, Tensor] | None:
        """What was kept of a layer's call; None where it was not done."""

    def keep(self, number: int, call: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep it."""


@final
@dataclass(frozen=True, slots=True)
class Inputs:
    """What the inputs of a model's matrices are like on some text, by the names of `input_squares`.

    Attributes:
        squares: the mean square of each input feature.
        rows: rows that a matrix was given; 0 for an expert that no token reached.
    """

    squares: Mapping[str, Float[Tensor, " C"]]
    rows: Mapping[str, int]


def input_squares(
    view: CheckpointView, tokens: TokenBatch, report: Report | None = None
) -> Mapping[str, Float[Tensor, " C"]]:
    """The mean square of each input feature of every matrix, over the tokens that reach it.

    By the name of a linear layer (``model.layers.0.self_attn.q_proj``, ``lm_head``); of an expert's
    matrices by ``NAME.EXPERT.up`` (gate and up have the same inputs) and ``NAME.EXPERT.down``. An expert that
    no token reached has the mean of its layer's. The model runs layer by layer from disk.

    Args:
        view: the checkpoint.
        tokens: calibration text.
        report: called after each layer with how many are done and how many there are.
    """
    return inputs_of(Streamed(view), tokens, report).squares


def inputs_of(
    streamed: Streamed, tokens: TokenBatch, report: Report | None = None, kept: KeptLayers | None = None
) -> Inputs:
    """What `input_squares` measures, with the number of rows that each matrix was given.

    The model is read once, whatever the length of the text.

    Args:
        streamed: the model.
        tokens: calibration text.
        report: called after each layer with how many are done and how many there are.
        kept: layers that stopped work has done are not run again, and those that are done now are kept.
    """
    view = streamed.view
    cursor, sums = Cursor(), _Sums()
    observers = {
        layer.name: _ExpertInputs(layer, math_of(streamed.model.get_submodule(layer.name)), sums)
        for layer in view.layers
    }

    def run_layer(
        number: int, call: int, forward: Forward, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        known = None if kept is None else kept.read(number, call)
        if known is not None:
            made = known.pop(OUTPUTS)
            sums.restore(known)
        else:
            made = forward(hidden, index, weights)
            if kept is not None:
                kept.keep(number, call, {OUTPUTS: made, **sums.of(f"{view.layers[number].name}.")})
        if report is not None:
            report(number + 1, len(view.layers))
        return made

    def at_the_end(states: Tensor) -> None:
        sums.add("lm_head", states.flatten(0, 1)[cursor.valid])

    with ExitStack() as stack:
        for name, module in streamed.model.named_modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_pre_hook(_watching(name, cursor, sums)).remove)
        stack.enter_context(attached(streamed.model, observers, cursor))
        run_together(streamed, tokens, cursor, run_layer, on_states=at_the_end)
    found, counted = sums.means(), sums.rows()
    for layer in view.layers:
        for part in ("up", "down"):
            names = [f"{layer.name}.{expert}.{part}" for expert in range(layer.num_experts)]
            reached = [found[name] for name in names if name in found]
            if reached:
                usual = torch.stack(reached).mean(0)
                found |= {name: usual for name in names if name not in found}
    return Inputs(found, {name: counted.get(name, 0) for name in found})


@final
class _Sums:
    """Squares of inputs added up, and how many rows there were, by name."""

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def add(self, name: str, rows: Float[Tensor, "n C"]) -> None:
        """Add some rows of inputs."""
        if rows.shape[0] == 0:
            return
        squares = rows.float().square().sum(0)
        self._squares[name] = self._squares[name] + squares if name in self._squares else squares
        self._rows[name] = self._rows.get(name, 0) + rows.shape[0]

    def means(self) -> dict[str, Tensor]:
        """The mean squares."""
        return {name: squares / self._rows[name] for name, squares in self._squares.items()}

    def rows(self) -> dict[str, int]:
        """The numbers of rows."""
        return dict(self._rows)

    def of(self, start: str) -> dict[str, Tensor]:
        """All under names that begin so, for `restore`."""
        found = {name: squares for name, squares in self._squares.items() if name.startswith(start)}
        rows = {f"{_ROWS}{name}": torch.tensor([self._rows[name]]) for name in found}
        return {**rows, **{f"{_SQUARES}{name}": squares.clone() for name, squares in found.items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `of` gave in place of what there is."""
        for name, value in tensors.items():
            if name.startswith(_SQUARES):
                self._squares[name.removeprefix(_SQUARES)] = value
            else:
                self._rows[name.removeprefix(_ROWS)] = int(value)


def _watching(name: str, cursor: Cursor, sums: _Sums) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that adds what a linear layer is given, padding left out."""

    def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        del module
        rows = inputs[0].detach().flatten(0, -2)
        sums.add(name, rows[cursor.valid] if rows.shape[0] == cursor.valid.shape[0] else rows)

    return add


@final
class _ExpertInputs:
    """Adds up what the two matrices of each expert of a layer are multiplied with.

    An `mixtura.kernels.AssignmentObserver`.
    """

    def __init__(self, layer: LayerView, math: ExpertMath, sums: _Sums) -> None:
        self._layer, self._math, self._sums = layer, math, sums

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """Nothing is asked of whole batches."""

    def expert(
        self,
        expert: int,
        token_ids: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        inputs: Float[Tensor, "n D"],
        outputs: Float[Tensor, "n D"],
    ) -> None:
        """Add an expert's rows."""
        del weights, outputs
        if token_ids.numel() == 0:
            return
        hidden = self._math.hidden(inputs, self._layer.native_expert(expert).to(inputs.dtype))
        self._sums.add(f"{self._layer.name}.{expert}.up", inputs)
        self._sums.add(f"{self._layer.name}.{expert}.down", hidden)

    def finish(self) -> None:
        """Nothing is left to do."""
