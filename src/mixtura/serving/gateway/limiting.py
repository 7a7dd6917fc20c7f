"""How often and how much at once: of keys, and of upstreams. Counted by each process for itself."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from mixtura.serving.api.refusals import ApiError
from mixtura.serving.gateway.config import Key, Upstream


@final
class Limits:
    """What was asked in the last minute, and what is under way."""

    def __init__(self) -> None:
        storage = MemoryStorage()
        # Requests to the one; of tokens there are too many to keep each.
        self._requests = MovingWindowRateLimiter(storage)
        self._tokens = SlidingWindowCounterRateLimiter(storage)
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def admitted(self, name: str, key: Key, tokens: int) -> Iterator[None]:
        """While a key's request is under way.

        Args:
            name: of the key.
            key: its limits.
            tokens: that the request reads and may write.

        Raises:
            ApiError: it is one too many.
        """
        if key.concurrency is not None and self._under_way[name] >= key.concurrency:
            raise _too_many(f"{key.concurrency} requests of this key are under way already", 1)
        if key.tokens_per_minute is not None:
            limit = RateLimitItemPerMinute(key.tokens_per_minute)
            if tokens > key.tokens_per_minute:
                raise ApiError(
                    f"this request may take {tokens} tokens, and its key {key.tokens_per_minute} a minute; "
                    "give a smaller max_tokens",
                    code="too_many_tokens",
                )
            if not self._tokens.hit(limit, "tokens", name, cost=tokens):
                after = _reset(self._tokens.get_window_stats(limit, "tokens", name).reset_time)
                raise _too_many(f"this key has {key.tokens_per_minute} tokens a minute", after)
        if key.requests_per_minute is not None:
            limit = RateLimitItemPerMinute(key.requests_per_minute)
            if not self._requests.hit(limit, "requests", name):
                raise _too_many(
                    f"this key has {key.requests_per_minute} requests a minute",
                    self._again(limit, "requests", name),
                )
        with self._counted(name):
            yield

    def upstream_wait_s(self, name: str, upstream: Upstream) -> int | None:
        """None where an upstream may be sent one more request, which is counted; else seconds to wait."""
        if upstream.concurrency is not None and self._under_way[f"upstream {name}"] >= upstream.concurrency:
            return 1
        if upstream.requests_per_minute is not None:
            limit = RateLimitItemPerMinute(upstream.requests_per_minute)
            if not self._requests.hit(limit, "upstream", name):
                return self._again(limit, "upstream", name)
        return None

    def started(self, upstream: str) -> None:
        """A call to an upstream is under way, until it `ended`."""
        self._under_way[f"upstream {upstream}"] += 1

    def ended(self, upstream: str) -> None:
        """A call to an upstream is over."""
        self._under_way[f"upstream {upstream}"] -= 1

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        self._under_way[name] += 1
        try:
            yield
        finally:
            self._under_way[name] -= 1

    def _again(self, limit: RateLimitItem, what: str, name: str) -> int:
        return _reset(self._requests.get_window_stats(limit, what, name).reset_time)


def _reset(at: float) -> int:
    return max(1, math.ceil(at - time.time()))


def _too_many(why: str, after_s: int) -> ApiError:
    return ApiError(f"{why}; try again in {after_s} s", status=429, code="rate_limit", retry_after_s=after_s)
