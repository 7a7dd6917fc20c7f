"""What a GGUF file takes in llama.cpp: weights as they lie in the file, the cache, buffers for a batch."""

from __future__ import annotations

from collections.abc import Sequence

from mixtura.checkpoints.applying.staging import check_apart
from mixtura.checkpoints.gguf.write import GgufFile
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.errors import BudgetError
from mixtura.fitting.budget import Allowance, context_of, usual_budget
from mixtura.fitting.forms.gguf.units import PALETTE, Unit, least_bytes
from mixtura.fitting.records import Request
from mixtura.fitting.result import BudgetKind
from mixtura.report.units import format_bytes
from mixtura.running.decoding import require_generating
from mixtura.running.llama import runtime_bytes
from mixtura.running.memory import MemoryAccount, tokenizer_bytes

# llama.cpp's own defaults: tokens of a prompt that run at once, and keys and values in f16.
_BATCH, _CACHE_ITEM, _CACHE_STEP = 512, 2, 256


def gguf_allowance(
    request: Request, view: CheckpointView, planned: GgufFile, units: Sequence[Unit]
) -> Allowance:
    """The budget, and the account of the file without any rounding.

    Args:
        request: what the user asked for.
        view: the model.
        planned: its file without any rounding.
        units: what gets types.

    Raises:
        UserError: the place is no place for a result, or the model generates no text.
        BudgetError: the budget is smaller than the bare runtime.
        UnmetError: no budget was given, and nothing can be made smaller.
    """
    check_apart(request.out, view.path)
    require_generating(view)
    context, notes = context_of(request, view)
    kept = sum(unit.num_bytes(PALETTE.keep) for unit in units)
    always = planned.num_bytes - kept
    cache, working = _cache_bytes(planned, context), _working_bytes(planned, context)
    table = tokenizer_bytes(view.path)
    experts = sum(unit.num_bytes(PALETTE.keep) for unit in units if unit.is_experts)
    taken = MemoryAccount(
        weights_bytes=planned.num_bytes,
        kv_cache_bytes=cache,
        working_bytes=working,
        tokenizer_bytes=table,
        expert_bytes=experts,
    )
    fixed = always + cache + working + table
    least = fixed + least_bytes(units)
    kind: BudgetKind = "model"
    bare, budget = 0, request.model_memory_bytes or 0
    if request.memory_bytes is not None:
        bare, kind, budget = runtime_bytes(), "process", request.memory_bytes
    elif not budget:
        budget, why = usual_budget(taken, least)
        notes += why
    if budget <= bare:
        raise BudgetError(
            f"--memory {format_bytes(budget)} is less than llama.cpp takes without any model, "
            f"{format_bytes(bare)}; give more, or budget the model alone with --model-memory"
        )
    if taken.total_bytes <= budget - bare:
        notes += ("`mixtura export --format gguf` writes the file as it is, without any loss",)
    return Allowance(
        budget_bytes=budget,
        kind=kind,
        model_budget_bytes=budget - bare,
        runtime_bytes=bare,
        context=context,
        account=taken,
        fixed_bytes=fixed,
        active_bytes=0.0,
        dense_active_bytes=0.0,
        smallest_bytes=least,
        notes=notes,
    )


def _cache_bytes(planned: GgufFile, context: int) -> int:
    fields = planned.fields
    width = fields["attention.key_length"] + fields["attention.value_length"]
    tokens = -(-context // _CACHE_STEP) * _CACHE_STEP
    return int(fields["block_count"] * fields["attention.head_count_kv"] * width * tokens * _CACHE_ITEM)


def _working_bytes(planned: GgufFile, context: int) -> int:
    """What a batch of a prompt takes at the widest place: its logits, or its scores of attention."""
    fields = planned.fields
    batch = min(_BATCH, context)
    scores = fields["attention.head_count"] * context
    states = 4 * fields["embedding_length"]
    return int(4 * batch * (max(fields["vocab_size"], scores) + states))
