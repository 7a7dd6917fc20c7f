"""What calibration text says of the neurons of experts, forwards or backwards too, and which of them go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mixtura.checkpoints.applying.trimming import trimmed_field
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.view import LayerView
from mixtura.checkpoints.viewing.disk import DiskView
from mixtura.data.tokens import TokenBatch
from mixtura.errors import BudgetError, CheckpointError, UserError
from mixtura.fitting.clock import Progress
from mixtura.fitting.compressing.records import Choices
from mixtura.fitting.journal import Journal
from mixtura.kernels import ExpertMath
from mixtura.kernels.backend import math_of
from mixtura.methods import declared_tags
from mixtura.methods.trimmers import NeuronsSeen, Trimmer
from mixtura.report.units import format_bytes
from mixtura.running.loading import load
from mixtura.running.memory.available import available_bytes
from mixtura.running.observing.attach import attached
from mixtura.running.observing.recorder import Cursor
from mixtura.running.stream import Streamed
from mixtura.running.together import Forward, run_together
from mixtura.types import Plan, Trim

Notify = Callable[[str], None]
_SEEN = "neurons.safetensors"
GRADIENTS = "reads:gradients"
# Kernels and programs like widths that are multiples of this, where the width was one.
_STEP = 8


@final
class NeuronSums:
    """Adds up squares of the neurons of a layer's experts; a `mixtura.kernels.AssignmentObserver`.

    Args:
        layer: the layer.
        math: what its experts compute around their matrices.
        with_gradients: make room for derivatives, which `gradient` adds up.
    """

    def __init__(self, layer: LayerView, math: ExpertMath, *, with_gradients: bool) -> None:
        self.layer = layer
        self._math = math
        shape = (layer.num_experts, layer.shape.d_expert)
        self.rows = torch.zeros(layer.num_experts, dtype=torch.int64)
        self.squares = torch.zeros(shape)
        self.pulls = torch.zeros(shape) if with_gradients else None
        self._chosen: tuple[Tensor, Tensor] | None = None

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """Remember who was chosen, for when the gradient comes."""
        del hidden
        self._chosen = (top_k_index.detach(), top_k_weights.detach().float())

    @torch.no_grad()
    def expert(
        self,
        expert: int,
        token_ids: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        inputs: Float[Tensor, "n D"],
        outputs: Float[Tensor, "n D"],
    ) -> None:
        """Add what an expert's neurons put out."""
        del weights, outputs
        if not token_ids.numel():
            return
        hidden = self._math.hidden(inputs, self.layer.native_expert(expert).to(inputs.dtype))
        self.squares[expert] += hidden.float().square().sum(0)
        self.rows[expert] += len(hidden)

    def finish(self) -> None:
        """Nothing is left to do."""

    @torch.no_grad()
    def gradient(self, by_output: Float[Tensor, "T D"]) -> None:
        """Add the derivatives of the last batch's loss by each neuron's output, from that by the layer's.

        An expert's output counts in the layer's by its weight, and so does the gradient by it.
        """
        assert self._chosen is not None
        assert self.pulls is not None
        index, weights = self._chosen
        flat = by_output.detach().float().reshape(-1, by_output.shape[-1])
        for expert in index[index < self.layer.num_experts].unique().tolist():
            tokens, places = (index == expert).nonzero(as_tuple=True)
            own = flat[tokens] * weights[tokens, places, None]
            down = self.layer.native_expert(expert).down.float()
            self.pulls[expert] += (own @ down).square().sum(0)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        found = {"rows": self.rows, "squares": self.squares}
        return found if self.pulls is None else {**found, "pulls": self.pulls}


def check_neurons(choices: Choices, view: CheckpointView, trimmer: Trimmer) -> None:
    """Refuse, before text is read, a model that experts cannot be made narrower in, or that is too large.

    Raises:
        UserError: says why, and what can be done.
    """
    assert isinstance(view, DiskView), "no plan is applied to what is packed already"
    assert choices.keep_neurons is not None
    trimmed_field(view)
    kept_width(view, choices.keep_neurons)
    if GRADIENTS in declared_tags(type(trimmer)) and view.num_bytes > available_bytes():
        raise UserError(
            f"--neurons {choices.neurons} reads gradients, for which all of the model is in memory, and it "
            f"takes {format_bytes(view.num_bytes)} of the {format_bytes(available_bytes())} there are; give "
            f"--neurons contribution, which streams it, or a machine with more memory"
        )


def trim_plan(
    view: CheckpointView, trimmer: Trimmer, width: int, tokens: TokenBatch, journal: Journal, notify: Notify
) -> tuple[Plan, dict[int, dict[int, int]]]:
    """The plan that leaves every expert so many neurons, and by layer how many tokens each expert saw.

    What the pass over text found comes from the journal if an earlier run has kept it.

    Raises:
        CheckpointError: what the model computes is no number.
    """
    if not journal.path(_SEEN).is_file():
        found = _seen(view, tokens, GRADIENTS in declared_tags(type(trimmer)), notify)

        def save(aside: Path) -> None:
            named = {f"{layer}.{name}": one for layer, held in found.items() for name, one in held.items()}
            save_file(named, str(aside))

        journal.write(_SEEN, save)
    held = load_file(str(journal.path(_SEEN)))
    actions, loads = [], {}
    for layer in view.layers:
        rows, squares, pulls = (held.get(f"{layer.index}.{name}") for name in ("rows", "squares", "pulls"))
        assert rows is not None
        assert squares is not None
        loads[layer.index] = {expert: int(count) for expert, count in enumerate(rows.tolist())}
        for expert in range(layer.num_experts):
            down = layer.native_expert(expert).down
            own = None if pulls is None else pulls[expert]
            scores = trimmer.scores(_of_expert(int(rows[expert]), squares[expert], own, down))
            if not bool(torch.isfinite(scores).all()):
                raise CheckpointError(
                    f"neurons of expert {expert} of layer {layer.index} have scores that are NaN or "
                    f"infinite; look whether the checkpoint is damaged, or give another text"
                )
            order = torch.argsort(scores, descending=True, stable=True)
            actions.append(Trim(layer.index, expert, tuple(sorted(order[width:].tolist()))))
    return Plan(checkpoint_digest(view.path), tuple(actions)), loads


def kept_width(view: CheckpointView, keep: float) -> int:
    """How many neurons a share of an expert's is: a multiple of 8 where all of them are one.

    Raises:
        BudgetError: it is none.
    """
    whole = view.layers[0].shape.d_expert
    step = _STEP if whole % _STEP == 0 else 1
    width = math.floor(keep * whole / step + 1e-9) * step
    if not width:
        raise BudgetError(
            f"--keep-neurons {keep:g} leaves none of an expert's {whole} neurons; give at least "
            f"{step / whole:g}"
        )
    return width


def _of_expert(
    count: int, squares: Float[Tensor, " F"], pulls: Float[Tensor, " F"] | None, down: Float[Tensor, "D F"]
) -> NeuronsSeen:
    """What is known of one expert; where no token reached it, its neurons count as equally active."""
    if count:
        return NeuronsSeen(squares / count, down, None if pulls is None else pulls / count)
    lengths = down.float().square().sum(0)
    return NeuronsSeen(torch.ones_like(squares), down, None if pulls is None else lengths)


def _seen(
    view: CheckpointView, tokens: TokenBatch, with_gradients: bool, notify: Notify
) -> dict[int, dict[str, Tensor]]:
    """One pass over text: streamed, or with gradients in memory."""
    what = "observing neurons, with gradients in memory" if with_gradients else "observing neurons"
    notify(what)
    run, unit = (_backwards, "sequence") if with_gradients else (_streamed, "layer")
    sums = run(view, tokens, lambda steps: Progress(what, steps, notify, unit))
    return {one.layer.index: one.tensors() for one in sums}


def _streamed(
    view: CheckpointView, tokens: TokenBatch, progress_of: Callable[[int], Progress]
) -> list[NeuronSums]:
    """The model is read layer by layer, once."""
    streamed, cursor = Streamed(view), Cursor()
    sums = _sums_of(view, streamed.model, with_gradients=False)
    progress = progress_of(len(sums))

    def run_layer(
        number: int, call: int, forward: Forward, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        del number, call
        progress.advance()
        return forward(hidden, index, weights)

    with attached(streamed.model, _by_name(sums), cursor):
        run_together(streamed, tokens, cursor, run_layer)
    return sums


def _backwards(
    view: CheckpointView, tokens: TokenBatch, progress_of: Callable[[int], Progress]
) -> list[NeuronSums]:
    """Sequence by sequence through the model in memory, and the loss back to every layer's experts."""
    model: Any = load(view.path)
    model.requires_grad_(False)
    cursor, sums = Cursor(), _sums_of(view, model, with_gradients=True)
    progress = progress_of(tokens.num_sequences)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(attached(model, _by_name(sums), cursor))
        # What has no gradient of its own begins to have one here.
        inputs = model.get_input_embeddings()
        stack.callback(inputs.register_forward_hook(lambda *parts: parts[-1].requires_grad_(True)).remove)
        for one in sums:
            experts = model.get_submodule(one.layer.name)
            stack.callback(experts.register_forward_hook(_listening(one)).remove)
        for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True):
            own = ids[mask.bool()][None]
            everything = torch.ones(own.shape[1], dtype=torch.bool)
            cursor.move(everything, torch.zeros(own.shape[1], dtype=torch.int64))
            if own.shape[1] > 1:
                logits = model(input_ids=own, use_cache=False).logits[0, :-1]
                F.cross_entropy(logits.float(), own[0, 1:], reduction="sum").backward()
            progress.advance()
    return sums


def _listening(one: NeuronSums) -> Callable[..., None]:
    """A hook that waits for the gradient by a layer's output."""

    def hook(module: Any, inputs: Any, output: Tensor) -> None:
        del module, inputs
        output.register_hook(one.gradient)

    return hook


def _sums_of(view: CheckpointView, model: Any, *, with_gradients: bool) -> list[NeuronSums]:
    return [
        NeuronSums(layer, math_of(model.get_submodule(layer.name)), with_gradients=with_gradients)
        for layer in view.layers
    ]


def _by_name(sums: list[NeuronSums]) -> Mapping[str, NeuronSums]:
    return {one.layer.name: one for one in sums}
