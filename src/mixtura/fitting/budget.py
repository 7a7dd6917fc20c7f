"""What the user's budget leaves for the model, and what the unchanged model would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.summary import summarize
from mixtura.errors import BudgetError
from mixtura.fitting.records import Request
from mixtura.fitting.result import BudgetKind
from mixtura.fitting.runtime import known_runtime_bytes
from mixtura.report.units import format_bytes
from mixtura.running.memory import MemoryAccount, account


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

    @property
    def expert_budget_bytes(self) -> int:
        """What the budget leaves for routed experts in fewer bits."""
        return self.model_budget_bytes - self.fixed_bytes


def allowance(request: Request, view: CheckpointView, runtime: int | None = None) -> Allowance:
    """Account for the unchanged model and take the runtime off the budget.

    Args:
        request: what the user asked for.
        view: the model.
        runtime: bytes of the bare runtime, if they are known; measured otherwise.

    Raises:
        BudgetError: the budget is smaller than the runtime alone.
    """
    context = min(request.context, _positions(view) or request.context)
    taken = account(view, context)
    packed = account(view, context, as_packed=True)
    bare = known_runtime_bytes() if runtime is None else runtime
    kind: BudgetKind = "model"
    if request.memory_bytes is not None:
        kind, budget = "process", request.memory_bytes
        left = budget - bare
    else:
        budget = request.model_memory_bytes or taken.total_bytes - taken.weights_bytes // 2
        left = budget
    if left <= 0:
        raise BudgetError(
            f"--memory {format_bytes(budget)} is less than Python with PyTorch and transformers takes "
            f"without any model, {format_bytes(bare)}; give more, or budget the model alone with "
            f"--model-memory"
        )
    summary = summarize(view)
    routed = sum(layer.top_k * layer.expert_num_bytes for layer in summary.layers)
    return Allowance(
        budget_bytes=budget,
        kind=kind,
        model_budget_bytes=left,
        runtime_bytes=bare,
        context=context,
        account=taken,
        fixed_bytes=packed.total_bytes - packed.expert_bytes,
        active_bytes=float(summary.bytes_per_token),
        dense_active_bytes=float(summary.bytes_per_token - routed),
    )


def _positions(view: CheckpointView) -> int | None:
    """The longest context the model was made for, where its config says so."""
    found = getattr(view.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None
