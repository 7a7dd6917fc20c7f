"""What a budget of memory leaves for experts, and how that is cut into slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.errors import BudgetError
from mixtura.report.units import format_bytes
from mixtura.running.memory.accounting import account
from mixtura.running.memory.process import resident_bytes
from mixtura.running.memory.runtime import known_runtime_bytes
from mixtura.running.tiers.reading import Reader
from mixtura.running.tiers.recipes import Recipe
from mixtura.running.tiers.slots import slot_bytes

# Sizes of experts that differ by less share slots: what that wastes is less than dividing the pool does.
_ALIKE: Final = 0.1
# Slots of each size without which nothing runs: one is multiplied while the next is read.
_LEAST_SLOTS: Final = 2
# Records of an expert's tensors, in Python and for the kernels, and digests of its pieces.
_RECORD_BYTES: Final = 8 << 10


@final
@dataclass(frozen=True, slots=True)
class SlotPlan:
    """Slots of one size: how large an expert they hold, how many there are, and for how many experts."""

    num_bytes: int
    num_slots: int
    num_experts: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """A budget and what it is spent on, in bytes.

    Attributes:
        budget_bytes: of the whole process.
        runtime_bytes: Python, PyTorch and transformers, and whatever else the process holds already.
        fixed_bytes: weights outside routed experts, the cache at the context, working buffers, the tokenizer.
        buffer_bytes: of reads, and records of experts.
        pool_bytes: slots for experts.
        expert_bytes: all routed experts.
        context: tokens that the cache holds.
        slots: how the pool is cut.
    """

    budget_bytes: int
    runtime_bytes: int
    fixed_bytes: int
    buffer_bytes: int
    pool_bytes: int
    expert_bytes: int
    context: int
    slots: tuple[SlotPlan, ...]


def divide(
    view: CheckpointView,
    recipes: Sequence[Recipe],
    budget_bytes: int,
    context: int,
    runtime: int | None = None,
    *,
    more: int = 0,
) -> Division:
    """Divide a budget of the whole process.

    Args:
        view: the checkpoint.
        recipes: of its layers.
        budget_bytes: memory that the process may take.
        context: tokens of prompt and answer together.
        runtime: bytes of the process without the model; measured where they are not given.
        more: bytes to leave for other texts that run at the same time; counted as fixed.

    Raises:
        BudgetError: the model cannot run in it, with the smallest budget in which it can.
    """
    positions = getattr(view.config.get_text_config(), "max_position_embeddings", None)
    context = min(context, int(positions)) if positions else context
    bare = max(known_runtime_bytes(), resident_bytes()) if runtime is None else runtime
    taken = account(view, context)
    fixed = taken.total_bytes - taken.expert_bytes + more
    sizes = Counter(slot_bytes(r.num_bytes(e)) for r in recipes for e in r.owners)
    buffers = Reader.buffer_bytes() + _RECORD_BYTES * sum(r.num_experts for r in recipes)
    classes = _merged(sizes)
    least = sum(size * min(_LEAST_SLOTS, num) for size, num in classes)
    smallest = bare + fixed + buffers + least
    if budget_bytes < smallest:
        raise BudgetError(
            f"{format_bytes(budget_bytes)} is too little to run this model at {context} tokens of context: "
            f"{format_bytes(bare)} for Python and PyTorch, {format_bytes(fixed)} for what is not routed "
            f"experts, {format_bytes(buffers + least)} for reading them; the smallest memory is "
            f"{_rounded_up(smallest)}"
        )
    slots = _cut(classes, budget_bytes - bare - fixed - buffers)
    return Division(
        budget_bytes=budget_bytes,
        runtime_bytes=bare,
        fixed_bytes=fixed,
        buffer_bytes=buffers,
        pool_bytes=sum(one.num_slots * one.num_bytes for one in slots),
        expert_bytes=sum(size * num for size, num in sizes.items()),
        context=context,
        slots=slots,
    )


def _merged(sizes: Counter[int]) -> list[tuple[int, int]]:
    """Sizes of slots and how many experts each is for, the largest first."""
    made: list[tuple[int, int]] = []
    for size, num in sorted(sizes.items(), reverse=True):
        if made and size >= (1 - _ALIKE) * made[-1][0]:
            made[-1] = made[-1][0], made[-1][1] + num
        else:
            made.append((size, num))
    return made


def _cut(classes: Sequence[tuple[int, int]], pool_bytes: int) -> tuple[SlotPlan, ...]:
    """Each size gets the share of the pool that its experts have of all; the least that each needs first."""
    total = sum(size * num for size, num in classes)
    counts = [min(_LEAST_SLOTS, num) for _, num in classes]
    left = pool_bytes - sum(count * size for count, (size, _) in zip(counts, classes, strict=True))
    share = min(1.0, pool_bytes / total)
    # The largest last, so that what rounding leaves goes to sizes that it still holds.
    for place, (size, num) in reversed([*enumerate(classes)]):
        more = max(0, min(int(share * num) - counts[place], left // size))
        counts[place] += more
        left -= more * size
    for place, (size, num) in enumerate(classes):
        more = min(num - counts[place], left // size)
        counts[place] += more
        left -= more * size
    return tuple(SlotPlan(size, count, num) for count, (size, num) in zip(counts, classes, strict=True))


def _rounded_up(num_bytes: int) -> str:
    """A size that people can give again: not less than it is."""
    unit, name = (1 << 30, "GiB") if num_bytes >= 1 << 33 else (1 << 20, "MiB")
    tenths = -(-num_bytes * 10 // unit) if name == "GiB" else -(-num_bytes // unit) * 10
    return f"{tenths / 10:g}{name}"
