"""What a model loses where its experts are rounded: each kept under what it depends on."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.view import LayerView, MemoryView
from mixtura.fitting.arena.exam import Exam, Sizes
from mixtura.fitting.arena.rounding.entries import KIND, Entry
from mixtura.fitting.calibration import Calibration, Seen, calibrated, side_by_side
from mixtura.kernels import ExpertTensors
from mixtura.kernels.backend import math_of
from mixtura.methods import header
from mixtura.methods.quantizers import LayerSeen, Quantizer
from mixtura.running.observing.attach import attached
from mixtura.running.observing.checkpoint import read_text
from mixtura.running.observing.passing import packed
from mixtura.running.observing.recorder import Cursor

# Raised when a change makes earlier results not comparable.
VERSION = 1
_BATCH_TOKENS = 4096


@final
class _Given:
    """Keeps what one layer's experts are given; a `mixtura.kernels.AssignmentObserver`."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._batches: list[Seen] = []

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """A batch begins."""
        index = top_k_index.masked_fill(top_k_index >= self._num_experts, -1)
        self._batches.append(Seen(hidden.clone(), index, top_k_weights.clone()))

    def expert(
        self,
        expert: int,
        token_ids: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        inputs: Float[Tensor, "n D"],
        outputs: Float[Tensor, "n D"],
    ) -> None:
        """Nothing is kept of what they make of it."""

    def finish(self) -> None:
        """Nothing is left to do."""

    @property
    def seen(self) -> Seen:
        """All batches as one."""
        parts = [(one.hidden, one.index, one.weights) for one in self._batches]
        hidden, index, weights = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Seen(hidden, index, weights)


@final
class RoundingExam:
    """Measures quantizers on a model in memory, in float32, calibrated by what the original's experts get.

    Args:
        path: a checkpoint with a tokenizer.
        folder: where measurements are kept.
        sizes: how much held-out text is read.
        num_tokens: of calibration text, in all domains together.
        seed: of the choice of both texts.
    """

    def __init__(self, path: Path, folder: Path, sizes: Sizes, num_tokens: int, seed: int) -> None:
        self._path, self._folder, self._sizes = path, folder, sizes
        self._num_tokens, self._seed = num_tokens, seed
        self._exam = Exam(path, sizes, seed)
        self._view = MemoryView(self._exam.model)
        self._known: dict[tuple[int, int], Calibration] = {}
        self._seen: dict[int, Seen] = {}

    def measure(self, entry: Entry) -> dict[str, Any]:
        """Loss, error of the experts' outputs, and bits of a weight of an entry."""
        file = self._file(entry)
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = self._measure(entry)
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_suffix(".part")
            aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            aside.replace(file)
        return found

    def is_known(self, entry: Entry) -> bool:
        """Whether it was measured before."""
        return self._file(entry).is_file()

    @torch.no_grad()
    def _measure(self, entry: Entry) -> dict[str, Any]:
        self._calibrate()
        rounded, quantizer = copy.deepcopy(self._exam.model), entry.quantizer()
        there, lost, whole = MemoryView(rounded), 0.0, 0.0
        for layer in self._view.layers:
            made = _rounded(layer, quantizer, self._known, self._seen[layer.index])
            math = math_of(self._exam.model.get_submodule(layer.name))
            for expert, tensors in made.items():
                known = self._known[layer.index, expert]
                lost, whole = lost + known.error(math, tensors), whole + known.whole
                old = there.layer(layer.index).native_expert(expert)
                old.up.copy_(tensors.up)
                old.down.copy_(tensors.down)
        scored = self._exam.scored(rounded)
        return {**scored, "bits": entry.bits, "output_error": lost / whole if whole else 0.0}

    @torch.no_grad()
    def _calibrate(self) -> None:
        """What calibration text says of every expert, made when it is first needed."""
        if self._known:
            return
        text = packed(
            read_text(
                open_checkpoint(self._path),
                None,
                max_tokens=self._num_tokens,
                max_length=self._sizes.length,
                seed=self._seed,
            )
        )
        model, cursor = self._exam.model, Cursor()
        given = {layer.name: _Given(layer.num_experts) for layer in self._view.layers}
        with attached(model, given, cursor):
            for batch in text.split(_BATCH_TOKENS):
                valid = batch.attention_mask.bool()
                domains = batch.domains[:, None].expand_as(valid)
                cursor.move(valid.reshape(-1), domains.reshape(-1))
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        for layer in self._view.layers:
            seen, math = given[layer.name].seen, math_of(model.get_submodule(layer.name))
            average, self._seen[layer.index] = seen.average, seen
            for expert in range(layer.num_experts):
                tensors = layer.native_expert(expert)
                known = calibrated(seen, average, (expert,), tensors, math)
                self._known[layer.index, expert] = known

    def _file(self, entry: Entry) -> Path:
        code = hashlib.sha256(header(KIND, entry.name).path.read_bytes()).hexdigest()
        named = [VERSION, checkpoint_digest(self._path), self._exam.digest, self._num_tokens]
        told = json.dumps([*named, code, entry.name, sorted(entry.settings.items())])
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        return self._folder / f"{entry.name}-{entry.rung:g}-{self._seed}-{digest}.json"


def _rounded(
    layer: LayerView, quantizer: Quantizer, known: dict[tuple[int, int], Calibration], seen: Seen
) -> dict[int, ExpertTensors]:
    """A layer's experts as they come back."""
    made: dict[int, ExpertTensors] = {}

    def turned(matrix: Tensor) -> Tensor:
        return matrix.mT if layer.layout.transposed else matrix

    first = quantizer.for_layer(
        LayerSeen(
            seen.hidden,
            seen.index,
            tuple(range(layer.num_experts)),
            lambda expert: turned(layer.native_expert(expert).up),
            layer.router_weight(),
        )
    )

    def round_one(expert: int) -> None:
        tensors, own = layer.native_expert(expert), known[layer.index, expert]
        up = first.encode(turned(tensors.up).contiguous(), own.up_moments)
        down = quantizer.encode(turned(tensors.down).contiguous(), own.down_moments)
        made[expert] = tensors._replace(up=turned(quantizer.decode(up)), down=turned(quantizer.decode(down)))

    side_by_side(round_one, range(layer.num_experts))
    return dict(sorted(made.items()))
