"""What a fit would take, from the files' headers and a second of measuring this machine."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import psutil

from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.checkpoints.summary import ModelSummary, summarize
from mixtura.fitting.budget import Allowance, allowance
from mixtura.fitting.candidates import MOST_BLOCKS, drop_evenly, uniform
from mixtura.fitting.machine import Machine, measure_machine
from mixtura.fitting.pricing import experts_of, option_bytes
from mixtura.fitting.records import DROP, KEEP, OPTIONS, WIDTHS, Candidate, Prices, Request
from mixtura.running.stream import DEFAULT_WORKING_BYTES

# Candidates of a search besides one per block of layers and the widths: mixtures, drops, improvements.
_OTHER_CANDIDATES = 12


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEstimate:
    """One kind of plan: what it would take, and the speed its bytes and its decoding allow at most."""

    name: str
    weights_bytes: int
    accounted_bytes: int
    active_bytes: float
    tokens_per_second: float
    fits: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a fit would take.

    ``fitting_bytes`` is the memory of the fit itself, which streams the model; ``disk_bytes`` what it
    needs free for the result, the plain plan beside it and the journal.
    """

    model: str
    budget_bytes: int
    model_budget_bytes: int
    runtime_bytes: int
    context: int
    seconds: float
    bytes_read: int
    bytes_written: int
    disk_bytes: int
    fitting_bytes: int
    smallest_bytes: int
    options: tuple[PlanEstimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """The object `mixtura fit --estimate --json` prints."""
        return asdict(self)


def estimate_fit(request: Request) -> Estimate:
    """Predict time, bytes, disk, memory and speeds of a fit; reads headers only and runs no model.

    Raises:
        UserError: the model or the budget cannot be worked with.
    """
    view = open_checkpoint(request.model)
    runtime = psutil.Process(os.getpid()).memory_info().rss
    allowed = allowance(request, view, runtime)
    machine = measure_machine(view.files[0])
    summary = summarize(view)
    prices = _blank_prices(view)
    options = tuple(
        _plan_estimate(name, candidate, prices, allowed, machine)
        for name, candidate in _kinds_of_plan(prices)
    )
    passes = 3 + min(MOST_BLOCKS, len(view.layers)) + len(WIDTHS) + _OTHER_CANDIDATES
    written = min(allowed.model_budget_bytes, summary.num_bytes) * 2
    seconds = _seconds(summary, machine, request, passes, written)
    states = request.held_out_tokens * summary.layers[0].d_model * 4
    return Estimate(
        model=request.name or str(request.model),
        budget_bytes=allowed.budget_bytes,
        model_budget_bytes=allowed.model_budget_bytes,
        runtime_bytes=runtime,
        context=allowed.context,
        seconds=min(seconds, request.time_s + 2 * summary.num_bytes / machine.disk_bytes),
        bytes_read=summary.num_bytes * passes,
        bytes_written=written + states,
        disk_bytes=written + states,
        fitting_bytes=runtime + _streaming_bytes(summary, request),
        smallest_bytes=min(option.accounted_bytes for option in options),
        options=options,
    )


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
    kinds.append(("smallest", drop_evenly(prices, importance, len(WIDTHS), most=True)))
    return kinds


def _plan_estimate(
    name: str, candidate: Candidate, prices: Prices, allowed: Allowance, machine: Machine
) -> PlanEstimate:
    chosen = np.asarray(candidate.choice)
    sizes = prices.num_bytes[np.arange(len(chosen)), chosen]
    saved = int(prices.num_bytes[:, KEEP].sum() - sizes.sum())
    active, seconds = allowed.dense_active_bytes, allowed.dense_active_bytes / machine.read_bytes
    for layer, top_k in prices.experts.top_k.items():
        here = prices.experts.of_layer(layer) & (chosen != DROP)
        read = top_k * float(sizes[here].mean())
        active += read
        seconds += read / machine.read_bytes
        option = int(chosen[here][0])
        if option != KEEP:
            # Two bytes a weight in bfloat16, written when it is decoded and read again to multiply.
            weights = top_k * float(prices.num_bytes[here, KEEP].mean()) / 2
            seconds += weights / machine.decode_weights[WIDTHS[option - 1]] + 2 * weights / machine.read_bytes
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


def _seconds(summary: ModelSummary, machine: Machine, request: Request, passes: int, written: int) -> float:
    """Reading, computing, encoding and writing, one after the other."""
    reading = passes * summary.num_bytes / machine.disk_bytes
    tokens = request.calibration_tokens * (1 + len(WIDTHS)) + request.held_out_tokens * passes
    computing = 2 * summary.active_parameters * tokens / (machine.matmul_flops / 2)
    slowest = min(machine.encode_weights.values())
    encoding = (passes + len(WIDTHS)) * summary.expert_parameters / slowest
    return reading + computing + encoding + written / machine.disk_bytes


def _streaming_bytes(summary: ModelSummary, request: Request) -> int:
    """One layer without experts, an expert dense and in float32, activations and final states."""
    expert = max(layer.expert_parameters for layer in summary.layers) * 12
    dense = (summary.num_bytes - summary.expert_num_bytes) // max(summary.num_layers, 1)
    states = request.held_out_tokens * summary.layers[0].d_model * 4
    width = summary.layers[0].d_model * 16 + summary.layers[0].top_k * summary.layers[0].d_model * 2
    return expert + dense + states + min(DEFAULT_WORKING_BYTES, request.held_out_tokens * width)
