"""What a fit would take, from the files' headers and a few seconds of one layer on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import psutil

from mixtura.checkpoints.skeleton import CheckpointView, build, open_checkpoint
from mixtura.checkpoints.summary import ModelSummary, summarize
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.tokens import num_embeddings_of
from mixtura.fitting.budget import Allowance, allowance
from mixtura.fitting.candidates import MOST_BLOCKS, drop_evenly, uniform
from mixtura.fitting.depth import Work, choose_depth, options_near, positions
from mixtura.fitting.pace import measure_pace
from mixtura.fitting.palette import DROP, KEEP, OPTIONS, SMALLEST, STORED
from mixtura.fitting.pricing import experts_of, option_bytes, uniform_bytes
from mixtura.fitting.records import Candidate, Prices, Request
from mixtura.fitting.speed import read_rates
from mixtura.fitting.texts import Texts, texts_of
from mixtura.machine.disk import disk_bytes_per_second
from mixtura.running.stream import DEFAULT_WORKING_BYTES

# Candidates of a search besides one per block of layers and the widths: mixtures and drops, and the
# moves between blocks, about two for each of them.
_OTHER_CANDIDATES, _MOVES_PER_BLOCK = 9, 2


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEstimate:
    """One kind of plan: what it would take, and about how fast it makes a token.

    The speed is that of its layers without experts as timed here, and of the bytes that it reads besides;
    None where another program will run it.
    """

    name: str
    weights_bytes: int
    accounted_bytes: int
    active_bytes: float
    tokens_per_second: float | None
    fits: bool


@runtime_checkable
class Less(Protocol):
    """What is measured in less depth."""

    @property
    def told(self) -> str:
        """It in words, as the end of a sentence."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a fit would take.

    ``seconds`` is what observing and searching need to try everything, ``limit_s`` how long they may
    take: then the search ends with the best so far, and ``less`` says what is measured in less depth.
    ``finishing_s`` is for writing the result and the plain plan beside it, and comes after.
    ``fitting_bytes`` is the memory of the fit itself, which streams the model; ``disk_bytes`` what it
    needs free for the result, the plain plan beside it and the journal.
    """

    model: str
    budget_bytes: int
    model_budget_bytes: int
    runtime_bytes: int
    context: int
    seconds: float
    limit_s: float
    finishing_s: float
    less: Less | None
    notes: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    disk_bytes: int
    fitting_bytes: int
    smallest_bytes: int
    options: tuple[PlanEstimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """The object `mixtura fit --estimate --json` prints."""
        return asdict(self)


def estimate_experts(request: Request) -> Estimate:
    """Predict a fit in mixtura's own format; runs one layer of the model for a moment.

    Raises:
        UserError: the model, its text or the budget cannot be worked with.
    """
    view = open_checkpoint(request.model)
    runtime = psutil.Process(os.getpid()).memory_info().rss
    allowed = allowance(request, view, runtime)
    texts = texts_of(request, allowed.context, load_tokenizer(view.path), num_embeddings_of(view.config))
    rates = read_rates(build(view).dtype)
    summary = summarize(view)
    prices = _blank_prices(view)
    work = Work(view, measure_pace(view))
    dense_s = summary.num_layers * work.pace.step_s + _head_bytes(view) / rates[KEEP]
    options = tuple(
        _plan_estimate(name, candidate, prices, allowed, rates, dense_s)
        for name, candidate in _kinds_of_plan(prices)
    )
    num_candidates = _num_candidates(view)
    written = min(allowed.model_budget_bytes, summary.num_bytes) * 2
    judged, seen = positions(texts.held_out), positions(texts.calibration)
    trying = _searching_s(work, texts, num_candidates)
    near = options_near(uniform_bytes(view), allowed.most_expert_bytes)
    depth = choose_depth(work, texts, request.time_s, near)
    kept = (judged + seen * len(view.layers)) * summary.layers[0].d_model * 2
    return Estimate(
        model=request.name or str(request.model),
        budget_bytes=allowed.budget_bytes,
        model_budget_bytes=allowed.model_budget_bytes,
        runtime_bytes=runtime,
        context=allowed.context,
        seconds=work.observing_s(seen, None) + trying,
        limit_s=request.time_s,
        finishing_s=_finishing_s(work, summary, written, Path(view.files[0])),
        less=None if depth.is_full else depth,
        notes=allowed.notes,
        bytes_read=summary.num_bytes * (2 + num_candidates),
        bytes_written=written + kept,
        disk_bytes=written + kept,
        fitting_bytes=runtime + streaming_bytes(summary, texts),
        smallest_bytes=allowed.smallest_bytes,
        options=options,
    )


def _head_bytes(view: CheckpointView) -> int:
    """What the logits of one token read."""
    vocabulary = int(view.config.get_text_config().vocab_size)
    return vocabulary * view.layers[0].shape.d_model * int(build(view).dtype.itemsize)


def _num_candidates(view: CheckpointView) -> int:
    blocks = min(MOST_BLOCKS, len(view.layers))
    return len(STORED) + (1 + _MOVES_PER_BLOCK) * blocks + _OTHER_CANDIDATES


def _searching_s(work: Work, texts: Texts, num_candidates: int) -> float:
    """The original and all candidates, of experts that were rounded while the model was observed."""
    return work.pass_s(texts.held_out) + num_candidates * work.candidate_s(texts.held_out)


def _finishing_s(work: Work, summary: ModelSummary, written: int, file: Path) -> float:
    """Reading the source and writing two plans."""
    return written / disk_bytes_per_second(file) + summary.num_bytes * work.pace.cold_s


def _blank_prices(view: CheckpointView) -> Prices:
    """Bytes of every option, with every expert alike: nothing has been measured yet."""
    sizes = np.concatenate([np.tile(option_bytes(x), (x.num_experts, 1)) for x in view.layers])
    errors = np.tile(np.arange(len(OPTIONS), dtype=float), (len(sizes), 1))
    return Prices(experts_of(view.layers), sizes, errors, np.ones(len(sizes), dtype=np.int64))


def _kinds_of_plan(prices: Prices) -> list[tuple[str, Candidate]]:
    importance = np.ones(len(prices.errors))
    half = int(prices.num_bytes[:, KEEP].sum()) // 2
    kinds = [("unchanged", uniform(prices, KEEP))]
    kinds += [(f"experts at {OPTIONS[option]}", uniform(prices, option)) for option in range(1, DROP)]
    kinds.append(("about half of the experts", drop_evenly(prices, importance, KEEP, half)))
    kinds.append(("smallest", drop_evenly(prices, importance, SMALLEST, most=True)))
    return kinds


def _plan_estimate(
    name: str,
    candidate: Candidate,
    prices: Prices,
    allowed: Allowance,
    rates: Mapping[int, float],
    dense_s: float,
) -> PlanEstimate:
    chosen = np.asarray(candidate.choice)
    sizes = prices.num_bytes[np.arange(len(chosen)), chosen]
    saved = int(prices.num_bytes[:, KEEP].sum() - sizes.sum())
    active, seconds = allowed.dense_active_bytes, dense_s
    for layer, top_k in prices.parts.top_k.items():
        here = prices.parts.of_layer(layer) & (chosen != DROP)
        read = top_k * float(sizes[here].mean())
        active += read
        seconds += read / rates[int(chosen[here][0])]
    unchanged = set(candidate.choice) == {KEEP}
    accounted = allowed.account.total_bytes if unchanged else allowed.fixed_bytes + int(sizes.sum())
    return PlanEstimate(
        name=name,
        weights_bytes=allowed.account.weights_bytes - saved,
        accounted_bytes=accounted,
        active_bytes=active,
        tokens_per_second=1 / seconds,
        fits=accounted <= allowed.model_budget_bytes,
    )


def streaming_bytes(summary: ModelSummary, texts: Texts) -> int:
    """One layer without experts, an expert dense and in float32, activations and final states."""
    num_tokens = max(positions(texts.calibration), positions(texts.held_out))
    expert = max(layer.expert_parameters for layer in summary.layers) * 12
    dense = (summary.num_bytes - summary.expert_num_bytes) // max(summary.num_layers, 1)
    states = positions(texts.held_out) * summary.layers[0].d_model * 4
    width = summary.layers[0].d_model * 16 + summary.layers[0].top_k * summary.layers[0].d_model * 2
    return expert + dense + states + min(DEFAULT_WORKING_BYTES, num_tokens * width)
