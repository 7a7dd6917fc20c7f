"""A fit that is written as a GGUF file: a type for each tensor, by the KL of what llama.cpp computes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtura.checkpoints.gguf.libraries import LlamaLibrary, llama_library
from mixtura.checkpoints.gguf.tensors import FileTensor, Piece
from mixtura.checkpoints.gguf.types import TypeRules
from mixtura.checkpoints.gguf.write import GgufFile, encoded_piece, plan_file, write_file
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.data.tokens import TokenBatch
from mixtura.errors import UserError
from mixtura.fitting.budget import Allowance
from mixtura.fitting.candidates import choice_bytes
from mixtura.fitting.clock import Progress
from mixtura.fitting.depth import shortened
from mixtura.fitting.forms.base import Form, Told
from mixtura.fitting.forms.gguf.budget import gguf_allowance
from mixtura.fitting.forms.gguf.codes import Codes
from mixtura.fitting.forms.gguf.depth import FileDepth, FileWork, choose_file_depth, options_near
from mixtura.fitting.forms.gguf.pricing import errors_of, kept_from, kept_in
from mixtura.fitting.forms.gguf.stream import changed_stream
from mixtura.fitting.forms.gguf.units import (
    PALETTE,
    Unit,
    blocks_of,
    choice_map_of,
    parts_of,
    sizes_of,
    units_of,
)
from mixtura.fitting.outputs import KeptOutputs
from mixtura.fitting.records import Candidate, Observed, Prices, Quality, Request
from mixtura.fitting.search import OutOfTimeError
from mixtura.fitting.texts import Texts, as_batch
from mixtura.fitting.verifying import SAMPLE_TOKENS, Verified
from mixtura.running.llama import run_llama
from mixtura.running.memory.process import release
from mixtura.running.observing.importance import inputs_of
from mixtura.running.stream import Streamed

_DEPTH, _INPUTS, _ERRORS = "depth", "inputs.safetensors", "errors.safetensors"
_NEW_TOKENS = 32
# llama.cpp computes with 32 bits and more; what is judged is the rounding of weights.
_DTYPE = torch.float32


@final
class GgufForm(Form):
    """Tensors in llama.cpp's types, written as one file beside its report."""

    runs_source = False

    def __init__(self, request: Request, view: CheckpointView) -> None:
        super().__init__(request, view)
        self._num_streamed = 0

    @cached_property
    def library(self) -> LlamaLibrary:
        """llama.cpp's quantizers.

        Raises:
            UserError: they are not installed.
        """
        found = llama_library()
        if found is None:
            raise UserError(
                "--format gguf chooses among llama.cpp's types by its own quantizers, which are not "
                "installed; give: pip install 'mixtura[llama]' (it compiles for some minutes)"
            )
        return found

    @cached_property
    def planned(self) -> GgufFile:
        """The file without any rounding."""
        name = self.request.name.rsplit("/", 1)[-1] or self.view.path.name
        return plan_file(self.view, name, TypeRules([]), calibrated=True)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What gets a type."""
        return units_of(self.view, self.planned.tensors)

    @cached_property
    def _allowed(self) -> Allowance:
        planned = self.planned
        _ = self.library
        return gguf_allowance(self.request, self.view, planned, self.units)

    def allowance(self) -> Allowance:
        """See `Form.allowance`."""
        return self._allowed

    def allowance_for_estimate(self) -> Allowance:
        """The same where nothing is to be rounded: the library is asked only what it takes itself."""
        if self.request.memory_bytes is not None:
            return self._allowed
        return gguf_allowance(self.request, self.view, self.planned, self.units)

    @cached_property
    def _depth(self) -> FileDepth:
        tools = self.tools
        known = tools.journal.notes().get(_DEPTH)
        assert known is not None
        return FileDepth(**{**known, "options": tuple(known["options"])})

    def in_time(self, texts: Texts) -> Texts:
        """As much text, and as many types and blocks of tensors, as the time allows on this machine."""
        tools, room = self.tools, self.allowance().expert_budget_bytes
        known = tools.journal.notes().get(_DEPTH)
        if known is None:
            tools.notify("timing a layer of this model on this machine")
            work = FileWork.timed(self.view, self.units)
            depth = choose_file_depth(work, texts, tools.clock.left_s, room)
            tools.journal.note(_DEPTH, asdict(depth))
        elif not set(near := options_near(self.units, room)[:4]) <= set(known["options"]):
            # Begun for another budget; the text stays, and so do codes.
            tools.journal.note(_DEPTH, {**known, "options": sorted({*known["options"], *near})})
            tools.journal.path(_ERRORS).unlink(missing_ok=True)
        if self._depth.is_full:
            return texts
        self.notes.append(f"to keep the time, {self._depth.told}; a longer --time measures more")
        tools.notify(f"{self.notes[-1]}, once {tools.journal.directory} is removed")
        return shortened(texts, self._depth.of_text)

    def observed(self, texts: Texts) -> Observed:
        """See `Form.observed`."""
        self._inputs(as_batch(texts.calibration))
        path = self.tools.journal.path(_ERRORS)
        if not path.is_file():
            progress = Progress("pricing types of tensors", len(self.units), self.tools.notify)
            self.tools.notify("pricing types of tensors")
            errors = errors_of(
                self.units, self._depth.options, self._codes, self._importance[1], progress.advance
            )

            def save(aside: Path) -> None:
                save_file({"errors": torch.from_numpy(errors)}, str(aside))

            self.tools.journal.write(_ERRORS, save)
        errors = load_file(str(path))["errors"].numpy()
        sizes = sizes_of(self.units)
        nothing = np.zeros(len(self.units))
        blocks = blocks_of(self.units, self._depth.blocks)
        load = nothing.astype(np.int64)
        prices = Prices(parts_of(self.units), sizes, errors, load, PALETTE, blocks)
        self.price_with(prices)
        return Observed(prices, nothing)

    def _inputs(self, tokens: TokenBatch) -> None:
        """Have what calibration text says of the matrices' inputs in the journal."""
        tools = self.tools
        if tools.journal.path(_INPUTS).is_file():
            return
        tools.notify("observing what every matrix is given")

        def told(done: int, total: int) -> None:
            tools.notify(f"observing what every matrix is given: layer {done} of {total}")

        kept = KeptOutputs(tools.journal, "inputs")
        inputs = inputs_of(self.original(), tokens, told, kept)

        def save(aside: Path) -> None:
            save_file(kept_in(inputs.squares, inputs.rows), str(aside))

        tools.journal.write(_INPUTS, save)
        kept.forget()

    @cached_property
    def _importance(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        return kept_from(load_file(str(self.tools.journal.path(_INPUTS))))

    @cached_property
    def _codes(self) -> Codes:
        return Codes(self.tools.journal, self.library, self._importance[0])

    def original(self) -> Streamed:
        """See `Form.original`."""
        return Streamed(self.view, dtype=_DTYPE)

    def streamed(self, candidate: Candidate) -> Streamed:
        """See `Form.streamed`."""
        self._num_streamed += 1
        return changed_stream(self.view, self._chosen(candidate), self._ready, _DTYPE)

    def _ready(self, tensor: FileTensor, number: int) -> Tensor:
        """A piece as llama.cpp computes with it; its tensor is encoded when it is first asked for."""
        self._codes.ensure(tensor, self._check_time)
        return self._codes.decoded(tensor, number)

    def _check_time(self) -> None:
        # The first candidate, the plain plan, is measured however little time there is.
        if self._num_streamed > 1 and self.tools.clock.is_over:
            raise OutOfTimeError

    def _chosen(self, candidate: Candidate) -> list[tuple[Unit, tuple[FileTensor, ...]]]:
        """Units that are rounded, with their tensors as they are then."""
        pairs = zip(self.units, candidate.choice, strict=True)
        return [(unit, unit.at(option)) for unit, option in pairs if option != PALETTE.keep]

    def account_bytes(self, candidate: Candidate) -> int:
        """See `Form.account_bytes`."""
        return self.allowance().fixed_bytes + choice_bytes(self.prices, candidate.choice)

    def weights_bytes(self, candidate: Candidate) -> int:
        """See `Form.weights_bytes`."""
        return self._file(candidate).num_bytes

    def active_bytes(self, candidate: Candidate) -> float:
        """All matrices, of experts as many as a token chooses, of embeddings a row."""
        total = 0.0
        for unit, option in zip(self.units, candidate.choice, strict=True):
            size = float(unit.num_bytes(option))
            if unit.is_experts:
                layer = self.view.layers[0]
                size *= layer.top_k / layer.num_experts
            elif unit.kind == "token_embd" and any(other.kind == "output" for other in self.units):
                size /= unit.tensors[0].shape[0]
            total += size
        return total

    def _file(self, candidate: Candidate) -> GgufFile:
        kinds = {tensor.name: tensor for _, tensors in self._chosen(candidate) for tensor in tensors}
        tensors = tuple(kinds.get(tensor.name, tensor) for tensor in self.planned.tensors)
        return replace(self.planned, tensors=tensors)

    def write(self, candidate: Candidate, directory: Path, quality: Quality | None) -> None:
        """See `Form.write`."""
        del quality
        aside = directory.with_name(directory.name + ".aside")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        rounded = {tensor.name for _, tensors in self._chosen(candidate) for tensor in tensors}

        def encoded(tensor: FileTensor, piece: Piece) -> memoryview:
            if tensor.name in rounded:
                return self._codes.read(tensor, piece)
            return encoded_piece(tensor, piece, {})

        write_file(self._file(candidate), aside / self._name, encoded, lambda _: None)
        os.replace(aside, directory)

    @property
    def _name(self) -> str:
        return f"{self.request.out.name}.gguf"

    def verify(
        self, directory: Path, name: str, key: str, *, context: int, needed_bytes: int = 0
    ) -> Verified:
        """See `Form.verify`."""
        del needed_bytes
        noted = self.tools.journal.notes().get(key)
        if noted is not None:
            return Verified(**noted)
        release()
        self.tools.notify(f"generating with the {name} model in llama.cpp")
        path = directory / self._name
        ran = run_llama(path, context, num_new_tokens=min(_NEW_TOKENS, context // 2))
        verified = Verified(
            path.stat().st_size, None, ran.peak_bytes, ran.tokens_per_second, "run by llama.cpp"
        )
        self.tools.journal.note(key, asdict(verified))
        return verified

    def answers(self, directory: Path, tokenizer: Any, prompts: Sequence[str], context: int) -> list[str]:
        """See `Form.answers`."""
        del tokenizer
        asked = [(prompt, SAMPLE_TOKENS) for prompt in prompts]
        return list(run_llama(directory / self._name, context, prompts=asked).answers)

    def told(self, candidate: Candidate, directory: Path) -> Told:
        """See `Form.told`."""
        del directory
        chosen = self._file(candidate)
        types = {tensor.name.removesuffix(".weight"): tensor.kind.name for tensor in chosen.tensors}
        path = self.request.out / self._name
        return Told(
            None,
            choice_map_of(self.units, types),
            columns=tuple(dict.fromkeys(unit.kind for unit in self.units)),
            settings={"types": {unit.name: types[unit.name] for unit in self.units}},
            untouched=tuple(tensor.name for tensor in chosen.tensors if not tensor.is_rounded),
            commands={
                "llama.cpp": f'llama-cli -m {path} -p "..."',
                "a server of llama.cpp": f"llama-server -m {path}",
                "Python": f"python -c \"import llama_cpp; print(llama_cpp.Llama('{path}')('...'))\"",
            },
        )
