"""Options and lines of commands that run a model in less memory than its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixtura.errors import SettingError

if TYPE_CHECKING:
    from mixtura.running.tiers.opening import Wish

DEFAULT_CACHE = "auto"
NO_PREFETCH = "none"
MEMORY = typer.Option(
    None, help="Memory the whole process may take, such as 8GiB; experts beyond it are read from disk."
)
CACHE = typer.Option(
    DEFAULT_CACHE, help="With --memory: which experts stay; auto, or a cache of mixtura methods."
)
PREFETCH = typer.Option(NO_PREFETCH, help="With --memory: which are read ahead; see mixtura methods.")
TRACE = typer.Option(None, help="With --memory: a trace (mixtura observe) that these go by.")


def check_words(memory: str | None, cache: str, prefetch: str, trace: Path | None) -> None:
    """Refuse what cannot be meant, before anything heavy is imported.

    Raises:
        SettingError: a cache or prefetcher is named, but no memory given; or the memory is no size.
        UnknownNameError: there is none of that name.
    """
    from mixtura.methods import header
    from mixtura.report.units import parse_bytes

    if memory is None and (cache, prefetch, trace) != (DEFAULT_CACHE, NO_PREFETCH, None):
        raise SettingError(
            "--cache, --prefetch and --trace say how a model runs in less memory than its weights; give "
            "--memory, too, such as --memory 8GiB"
        )
    if memory is not None:
        parse_bytes(memory)
        if cache != DEFAULT_CACHE:
            header("caches", cache)
        if prefetch != NO_PREFETCH:
            header("prefetchers", prefetch)


def wish_of(memory: str | None, cache: str, prefetch: str, trace: Path | None, context: int) -> Wish | None:
    """What `mixtura.load` is to be given as ``memory``."""
    from mixtura.running.tiers.opening import Wish

    if memory is None:
        return None
    return Wish(memory=memory, cache=cache, prefetch=prefetch, trace=trace, context=context)


def tier_fields(model: Any) -> dict[str, Any]:
    """What happened to experts and how the budget was divided, as JSON values; {} for a model in memory."""
    from mixtura.running.tiers.opening import division_of, tiers_of

    tiers, division = tiers_of(model), division_of(model)
    if tiers is None:
        return {}
    fields: dict[str, Any] = {"experts": tiers.statistics.to_dict()}
    if division is not None:
        fields["memory"] = {
            "budget_bytes": division.budget_bytes,
            "runtime_bytes": division.runtime_bytes,
            "fixed_bytes": division.fixed_bytes,
            "buffer_bytes": division.buffer_bytes,
            "pool_bytes": division.pool_bytes,
            "expert_bytes": division.expert_bytes,
        }
    return fields


def tier_lines(model: Any) -> list[str]:
    """The same for people."""
    from mixtura.report.units import format_bytes
    from mixtura.running.tiers.choosing import Choosing
    from mixtura.running.tiers.opening import division_of, tiers_of

    tiers, division = tiers_of(model), division_of(model)
    if tiers is None:
        return []
    seen, lines = tiers.statistics, []
    if division is not None:
        share = division.pool_bytes / max(division.expert_bytes, 1)
        lines.append(
            f"memory: {format_bytes(division.pool_bytes)} for experts ({min(share, 1):.0%} of all), "
            f"{format_bytes(division.fixed_bytes)} for the rest of the model at {division.context} tokens, "
            f"{format_bytes(division.runtime_bytes)} for Python and PyTorch"
        )
    lines.append(
        f"experts: {seen.hit_rate:.1%} of {seen.needed} needed were in memory; "
        f"{format_bytes(seen.demanded_bytes)} read when needed, {seen.waited_ms / 1000:.2f} s waited"
    )
    leaders = [pool.cache.leader for pool in tiers.pools if isinstance(pool.cache, Choosing)]
    if leaders:
        lines.append(f"cache: chosen while it ran, in the end {', '.join(dict.fromkeys(leaders))}")
    if tiers.ahead is not None:
        off = ", switched off because it did not pay" if tiers.ahead.is_off else ""
        lines.append(
            f"read ahead: {format_bytes(seen.prefetched_bytes)}, of which {format_bytes(seen.used_bytes)} "
            f"were needed and {format_bytes(seen.wasted_bytes)} were not{off}"
        )
    return lines
