"""What the user's budget leaves for the model, and what the unchanged model would take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import numpy as np

from mixtura.checkpoints.applying.checking import check_source
from mixtura.checkpoints.applying.staging import check_apart
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.summary import summarize
from mixtura.errors import BudgetError, UnmetError
from mixtura.fitting.candidates import choice_bytes, smallest
from mixtura.fitting.palette import OPTIONS
from mixtura.fitting.pricing import experts_of, option_bytes
from mixtura.fitting.records import DEFAULT_CONTEXT, Prices, Request
from mixtura.fitting.rest import Rest, rest_of
from mixtura.fitting.result import BudgetKind
from mixtura.report.units import format_bytes
from mixtura.running.decoding import require_generating
from mixtura.running.memory import MemoryAccount, account
from mixtura.running.memory.runtime import known_runtime_bytes


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """The budget and the account of the unchanged model.

    Attributes:
        budget_bytes: as given (half of the weights, with cache and buffers, where nothing was).
        kind: whether that is the whole process or the model's account.
        model_budget_bytes: what it leaves for weights, cache and working buffers.
        runtime_bytes: the bare runtime.
        context: tokens the cache holds.
        account: of the unchanged model at that context.
        fixed_bytes: the account without routed experts, once those are decoded when they are used.
        active_bytes: bytes a token reads of the unchanged model.
        dense_active_bytes: those of them outside the routed experts.
        rest: what is outside the routed experts and could take 8 bits.
        smallest_bytes: the account of the smallest model that still runs.
        notes: what was not done as asked, a sentence each.
    """

    budget_bytes: int
    kind: BudgetKind
    model_budget_bytes: int
    runtime_bytes: int
    context: int
    account: MemoryAccount
    fixed_bytes: int
    active_bytes: float
    dense_active_bytes: float
    smallest_bytes: int
    rest: Rest = field(default_factory=Rest)
    notes: tuple[str, ...] = ()

    @property
    def expert_budget_bytes(self) -> int:
        """What the budget leaves for routed experts in fewer bits."""
        return self.model_budget_bytes - self.fixed_bytes

    @property
    def most_expert_bytes(self) -> int:
        """The same where what is outside the experts takes 8 bits."""
        return self.expert_budget_bytes + self.rest.saved_bytes


def allowance(request: Request, view: CheckpointView, runtime: int | None = None) -> Allowance:
    """Account for the unchanged model and take the runtime off the budget.

    Args:
        request: what the user asked for.
        view: the model.
        runtime: bytes of the bare runtime, if they are known; measured otherwise.

    Raises:
        UserError: what a fit does at its end would be refused: writing to the place, changing a model that
            must be changed, or generating with it.
        BudgetError: the budget is smaller than the runtime alone.
        UnmetError: no budget was given, and no plan makes the model smaller.
    """
    check_apart(request.out, view.path)
    require_generating(view)
    context, notes = context_of(request, view)
    taken = account(view, context)
    packed = account(view, context, as_packed=True)
    fixed = packed.total_bytes - packed.expert_bytes
    rest = rest_of(view, context, packed)
    least = fixed - rest.saved_bytes + _smallest_expert_bytes(view)
    bare = known_runtime_bytes() if runtime is None else runtime
    kind: BudgetKind = "model"
    if request.memory_bytes is not None:
        kind, budget = "process", request.memory_bytes
        left = budget - bare
    else:
        budget = request.model_memory_bytes or 0
        if not budget:
            budget, why = usual_budget(taken, least)
            notes += why
        left = budget
    if left <= 0:
        raise BudgetError(
            f"--memory {format_bytes(budget)} is less than Python with PyTorch and transformers takes "
            f"without any model, {format_bytes(bare)}; give more, or budget the model alone with "
            f"--model-memory"
        )
    if taken.total_bytes > left:
        check_source(view.path)
    summary = summarize(view)
    routed = sum(layer.top_k * layer.expert_num_bytes for layer in summary.layers)
    return Allowance(
        budget_bytes=budget,
        kind=kind,
        model_budget_bytes=left,
        runtime_bytes=bare,
        context=context,
        account=taken,
        fixed_bytes=fixed,
        active_bytes=float(summary.bytes_per_token),
        dense_active_bytes=float(summary.bytes_per_token - routed),
        smallest_bytes=least,
        rest=rest,
        notes=notes,
    )


def context_of(request: Request, view: CheckpointView) -> tuple[int, tuple[str, ...]]:
    """Tokens the cache is to hold, and what is to be said of them."""
    positions = _positions(view)
    if positions is None or request.context <= positions:
        return request.context, ()
    asked = "that is the default" if request.context == DEFAULT_CONTEXT else "asked for"
    note = (
        f"the context is {positions} tokens, the most the model was made for, instead of the "
        f"{request.context} {asked}"
    )
    return positions, (note,)


def usual_budget(taken: MemoryAccount, least: int) -> tuple[int, tuple[str, ...]]:
    """Half of the weights, with cache and buffers; the least a plan can keep where that is more.

    Raises:
        UnmetError: even that is no less than the unchanged model takes.
    """
    half = taken.total_bytes - taken.weights_bytes // 2
    if half >= least:
        return half, ()
    if least >= taken.total_bytes:
        raise UnmetError(
            f"this model cannot be made smaller: it takes {format_bytes(taken.total_bytes)} as it is, and "
            f"the smallest that a plan could make of it {format_bytes(least)}"
        )
    note = (
        f"no budget was given, and half of the weights, {format_bytes(half)} with cache and buffers, is less "
        f"than any plan can keep; the budget is the smallest that one can, {format_bytes(least)}"
    )
    return least, (note,)


def _smallest_expert_bytes(view: CheckpointView) -> int:
    """What the experts of the smallest model that still runs take."""
    layers = view.layers
    sizes = np.concatenate([np.tile(option_bytes(x), (x.num_experts, 1)) for x in layers])
    blank = np.zeros((len(sizes), len(OPTIONS)))
    prices = Prices(experts_of(layers), sizes, blank, np.zeros(len(sizes), dtype=np.int64))
    return choice_bytes(prices, smallest(prices).choice)


def _positions(view: CheckpointView) -> int | None:
    """The longest context the model was made for, where its config says so."""
    found = getattr(view.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None
