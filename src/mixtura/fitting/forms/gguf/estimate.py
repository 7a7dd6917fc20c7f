"""What a fit to a GGUF file would take, from the files' headers and a few seconds of one layer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from mixtura.checkpoints.gguf.libraries import llama_library
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.summary import summarize
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.tokens import num_embeddings_of
from mixtura.fitting.budget import Allowance
from mixtura.fitting.depth import positions
from mixtura.fitting.estimate import Estimate, PlanEstimate, streaming_bytes
from mixtura.fitting.forms.gguf.depth import MOST_BLOCKS, FileWork, choose_file_depth
from mixtura.fitting.forms.gguf.form import GgufForm
from mixtura.fitting.forms.gguf.units import PALETTE
from mixtura.fitting.records import Candidate, Request
from mixtura.fitting.texts import texts_of
from mixtura.machine.disk import disk_bytes_per_second

# A tensor's codes are kept in about so many types before a search is over.
_KEPT_TYPES = 3
_NO_LIBRARY = (
    "llama.cpp's quantizers are not installed (pip install 'mixtura[llama]'): their time is not in the "
    "estimate, and a fit cannot do without them"
)


def estimate_file(request: Request) -> Estimate:
    """Predict a fit to a GGUF file; with ``--model-memory`` also where llama.cpp is not installed.

    Raises:
        UserError: llama.cpp cannot run the model, or its text or the budget cannot be worked with.
    """
    view = open_checkpoint(request.model)
    form = GgufForm(request, view)
    allowed = form.allowance_for_estimate()
    texts = texts_of(request, allowed.context, load_tokenizer(view.path), num_embeddings_of(view.config))
    work = FileWork.timed(view, form.units)
    depth = choose_file_depth(work, texts, request.time_s, allowed.expert_budget_bytes)
    summary, count = summarize(view), len(PALETTE.stored)
    written = min(allowed.model_budget_bytes, form.planned.num_bytes)
    codes = _KEPT_TYPES * min(allowed.expert_budget_bytes, form.planned.num_bytes)
    states = (positions(texts.held_out) + positions(texts.calibration)) * summary.layers[0].d_model * 4
    runtime = psutil.Process(os.getpid()).memory_info().rss
    writing_s = (written + codes) / disk_bytes_per_second(Path(view.files[0]))
    return Estimate(
        model=request.name or str(request.model),
        budget_bytes=allowed.budget_bytes,
        model_budget_bytes=allowed.model_budget_bytes,
        runtime_bytes=allowed.runtime_bytes,
        context=allowed.context,
        seconds=work.needed_s(texts, MOST_BLOCKS, count),
        limit_s=request.time_s,
        finishing_s=writing_s + summary.num_bytes * work.work.pace.cold_s,
        less=None if depth.is_full else depth,
        notes=allowed.notes if llama_library() is not None else (*allowed.notes, _NO_LIBRARY),
        bytes_read=summary.num_bytes * (2 + work.passes(MOST_BLOCKS, count)),
        bytes_written=written + codes + states,
        disk_bytes=written + codes + states,
        fitting_bytes=runtime + streaming_bytes(summary, texts),
        smallest_bytes=allowed.smallest_bytes,
        options=tuple(_plans(form, allowed)),
    )


def _plans(form: GgufForm, allowed: Allowance) -> Iterator[PlanEstimate]:
    """The file as it is, in every type that all tensors can have, and in the smallest of each."""
    units = form.units
    kinds = [("unchanged", [PALETTE.keep] * len(units))]
    kinds += [
        (PALETTE.names[option], [option] * len(units))
        for option in PALETTE.stored
        if all(unit.allows(option) for unit in units)
    ]
    smallest = [min((o for o in PALETTE.stored if unit.allows(o)), key=unit.num_bytes) for unit in units]
    for name, choice in [*kinds, ("smallest", smallest)]:
        candidate = Candidate(name, tuple(choice))
        sizes = sum(unit.num_bytes(option) for unit, option in zip(units, choice, strict=True))
        accounted = allowed.fixed_bytes + sizes
        yield PlanEstimate(
            name=name,
            weights_bytes=form.weights_bytes(candidate),
            accounted_bytes=accounted,
            active_bytes=form.active_bytes(candidate),
            tokens_per_second=None,
            fits=accounted <= allowed.model_budget_bytes,
        )
