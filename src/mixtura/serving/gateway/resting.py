"""Models and upstreams that fail are left alone for a while, then tried by one request."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, final

from mixtura.serving.gateway.config import Resting
from mixtura.types.asking import Outcome

# What is wrong with the account or the address, and not with one model there.
_OF_UPSTREAMS: Final = frozenset({"rate", "auth", "quota", "down"})
# What will not be better in a second, whatever the number of failures.
_AT_ONCE: Final = frozenset({"auth", "quota"})
_OF_MODELS: Final = frozenset({"timeout", "broken"})


@final
@dataclass(slots=True)
class _State:
    failures: deque[float] = field(default_factory=deque)
    until: float = 0.0
    is_probed: bool = False


@final
class Rests:
    """What rests, and until when.

    Args:
        rule: after how many failures, and for how long.
        clock: seconds that only grow.
    """

    def __init__(self, rule: Resting, clock: Callable[[], float] = time.monotonic) -> None:
        self._rule = rule
        self._clock = clock
        self._states: dict[str, _State] = defaultdict(_State)

    def wait_s(self, model: str, upstream: str) -> float:
        """Seconds for which a model is not to be asked; 0 where it may be.

        Of what has rested one request is let through, and the rest waits for what comes of it: whoever gets 0
        says by `saw` what it was.
        """
        states = [self._states[f"model {model}"], self._states[f"upstream {upstream}"]]
        now = self._clock()
        wait = max(max(state.until - now, 0.0) for state in states)
        if wait > 0:
            return wait
        rested = [state for state in states if state.until > 0]
        if any(state.is_probed for state in rested):
            return 1.0
        for state in rested:
            state.is_probed = True
        return 0.0

    def saw(self, model: str, upstream: str, outcome: Outcome, after_s: float | None = None) -> None:
        """What came of asking a model; ``after_s`` is when its upstream wants to be asked again."""
        of_model, of_upstream = self._states[f"model {model}"], self._states[f"upstream {upstream}"]
        if outcome in ("ok", "refused"):
            for state in (of_model, of_upstream):
                state.failures.clear()
                state.until, state.is_probed = 0.0, False
            return
        was_probe = of_model.is_probed or of_upstream.is_probed
        of_model.is_probed = of_upstream.is_probed = False
        if outcome in _OF_UPSTREAMS:
            at_once = outcome in _AT_ONCE or was_probe or after_s is not None
            self._failed(of_upstream, at_once=at_once, after_s=after_s)
        elif outcome in _OF_MODELS:
            self._failed(of_model, at_once=was_probe, after_s=after_s)

    def resting(self) -> dict[str, float]:
        """Seconds for which each model and upstream rests."""
        now = self._clock()
        return {name: state.until - now for name, state in self._states.items() if state.until > now}

    def _failed(self, state: _State, *, at_once: bool, after_s: float | None) -> None:
        now = self._clock()
        state.failures.append(now)
        while state.failures and state.failures[0] < now - self._rule.window_s:
            state.failures.popleft()
        if at_once or len(state.failures) >= self._rule.failures:
            state.until = now + (self._rule.rest_s if after_s is None else after_s)
            state.failures.clear()
