"""What there is to see of a server while it runs: the engine's counts, its memory, its experts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, final

from mixtura.running.memory.process import resident_bytes
from mixtura.running.tiers.opening import division_of, tiers_of
from mixtura.serving.engine.loop import Engine


@final
class Watch:
    """Looks at an engine and its model.

    Args:
        engine: that runs.
        name: of the model.
        loads: for each MoE layer its number among the decoder layers, and how many tokens each expert had.
    """

    def __init__(self, engine: Engine, name: str, loads: Sequence[tuple[int, Any]]) -> None:
        self.engine = engine
        self.name = name
        self._loads = tuple(loads)

    def loads(self) -> list[tuple[int, list[int]]]:
        """Tokens that each expert had so far, by decoder layer."""
        return [(layer, [int(count) for count in counts.tolist()]) for layer, counts in self._loads]

    def experts(self) -> dict[str, Any] | None:
        """What was read from disk, and how many experts were in memory; None where all of them are."""
        tiers = tiers_of(self.engine.model)
        return None if tiers is None else tiers.statistics.to_dict()

    def memory(self) -> dict[str, int | None]:
        """Bytes: of the process, of its budget, for experts, for caches and what of these is in use."""
        division, prefixes = division_of(self.engine.model), self.engine.prefixes
        return {
            "resident": resident_bytes(),
            "budget": None if division is None else division.budget_bytes,
            "pool": None if division is None else division.pool_bytes,
            "experts": None if division is None else division.expert_bytes,
            "caches": prefixes.limit_bytes,
            "running": prefixes.running_bytes,
            "kept": prefixes.kept_bytes,
        }

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON values."""
        engine, counts = self.engine, self.engine.counts
        prompt = counts.prompt_tokens + counts.cached_tokens
        return {
            "model": self.name,
            "up_s": round(time.time() - counts.started_at, 1),
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "most_running": engine.limits.running,
            "most_waiting": engine.limits.waiting,
            "context": engine.limits.context,
            "finished": dict(counts.finished),
            "tokens": {
                "prompt": counts.prompt_tokens,
                "cached": counts.cached_tokens,
                "new": counts.new_tokens,
                "per_second": round(counts.tokens_per_second(), 2),
                "cached_share": counts.cached_tokens / prompt if prompt else None,
                "per_step": counts.step_rows / counts.steps if counts.steps else None,
            },
            "latency": counts.latencies(),
            "memory": self.memory(),
            "experts": self.experts(),
            "loads": [{"layer": layer, "tokens": loads} for layer, loads in self.loads()],
        }
