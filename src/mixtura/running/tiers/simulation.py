"""How long tokens would take at stated rates of disk and memory: the cost of running in little memory.

A layer's experts are multiplied as they come, so it takes the longer of reading what is missing and of
reading from memory what it needs; while the rest of the layer runs, the disk reads what was guessed. Time is
that of bytes alone: arithmetic, Python and what the disk takes to begin are left out, so a real run is
slower.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final, final

import torch
from torch import Tensor

from mixtura.methods.caches import Cache, Call, Key
from mixtura.methods.prefetchers import Prefetcher, Sight
from mixtura.running.tiers.ahead import Ahead
from mixtura.running.tiers.recording import Recorded
from mixtura.running.tiers.statistics import Statistics

_NO_TOKENS: Final = torch.zeros(1, 1)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a machine can read, and what a model asks for besides its experts.

    Attributes:
        disk_bytes_per_s: from disk.
        memory_bytes_per_s: from memory, while multiplying.
        other_bytes: weights outside routed experts that a token reads in one layer, and a layer's share of
            the head.
    """

    disk_bytes_per_s: float
    memory_bytes_per_s: float
    other_bytes: float


@final
@dataclass(slots=True, kw_only=True)
class Timed:
    """What came of replaying texts.

    Attributes:
        token_ms: what each token took.
        stall_ms: of that, the time in which nothing was multiplied.
        statistics: what was needed, read and read in vain.
        guessed: experts that were needed and had been guessed, and those of them that were still on their
        way. late: of these, those that were not there yet when they were needed. is_off: whether the
        prefetcher was switched off.
    """

    token_ms: list[float] = field(default_factory=list)
    stall_ms: list[float] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    guessed: int = 0
    late: int = 0
    is_off: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Over all tokens."""
        return 1000 * len(self.token_ms) / sum(self.token_ms) if self.token_ms else 0.0

    @property
    def p99_stall_ms(self) -> float:
        """The stall that 99 of 100 tokens do not exceed."""
        ordered = sorted(self.stall_ms)
        return ordered[max(0, math.ceil(0.99 * len(ordered)) - 1)] if ordered else 0.0

    @property
    def late_share(self) -> float:
        """Of guesses that were right."""
        return self.late / self.guessed if self.guessed else 0.0


@final
class Machine:
    """A disk, a memory and the room for experts in it, to run recorded calls on.

    Args:
        cache: decides who stays; its capacity is the room without that for guesses.
        num_ahead: room for guesses.
        expert_bytes: of each expert.
        rates: of the machine and the model.
    """

    def __init__(self, cache: Cache, num_ahead: int, expert_bytes: int, rates: Rates) -> None:
        self.statistics = Statistics()
        self.guessed = self.late = 0
        self._cache = cache
        self._num_ahead = num_ahead
        self._expert_bytes = expert_bytes
        self._rates = rates
        # Guessed experts in room of their own, the oldest first, and what is still to be read of each.
        self._ahead: OrderedDict[Key, float] = OrderedDict()

    def read_ahead(self, key: Key) -> int:
        """As `Tiers.read_ahead`."""
        if not self._num_ahead or key in self._cache.inside or key in self._ahead:
            return 0
        if len(self._ahead) >= self._num_ahead:
            oldest = next(iter(self._ahead))
            if self._ahead[oldest] > 0:
                return 0
            del self._ahead[oldest]
            self.statistics.wasted_bytes += self._expert_bytes
        self._ahead[key] = float(self._expert_bytes)
        self.statistics.prefetched_bytes += self._expert_bytes
        return self._expert_bytes

    def stop_ahead(self) -> None:
        """As `Tiers.stop_ahead`."""
        self.statistics.wasted_bytes += self._expert_bytes * len(self._ahead)
        self._ahead.clear()
        self._cache.grow(self._num_ahead)
        self._num_ahead = 0

    def need(self, call: Call) -> float:
        """Have a layer's experts come; returns the bytes that it must wait for."""
        self._cache.see(call)
        held = frozenset(Key(call.layer, expert) for expert in call.experts)
        waits = 0.0
        for expert in call.experts:
            key, counted = Key(call.layer, expert), self.statistics
            hit = self._cache.touch(*key, held if len(held) <= self._cache.capacity else ()).hit
            left = self._ahead.pop(key, None)
            counted.count(call.layer, hit or left is not None)
            if hit:
                continue
            if left is None:
                counted.demanded_bytes += self._expert_bytes
                waits += self._expert_bytes
            else:
                counted.used_bytes += self._expert_bytes
                self.guessed += 1
                self.late += left > 0
                waits += left
        return waits

    def idle(self, seconds: float) -> None:
        """The disk has so long for what was guessed."""
        can = seconds * self._rates.disk_bytes_per_s
        for key, left in self._ahead.items():
            read = min(left, can)
            self._ahead[key] = left - read
            can -= read


def replay_timed(
    recorded: Recorded, cache: Cache, rates: Rates, prefetcher: Prefetcher | None = None, num_ahead: int = 0
) -> Timed:
    """Run recorded texts at stated rates.

    Args:
        recorded: what a model chose; with outlooks and tokens where the prefetcher reads gates or tokens.
        cache: of the room for experts, without that for guesses.
        rates: of the machine and the model.
        prefetcher: what guesses; None for nobody.
        num_ahead: room for guesses.
    """
    machine, made = Machine(cache, num_ahead, recorded.expert_num_bytes, rates), Timed()
    place = (0, 0)

    def gates(later: int, x: Tensor) -> tuple[float, ...] | None:
        del x
        token, layer = place
        shares = outlook.get((layer, later))
        return None if shares is None else tuple(shares[token].tolist())

    ahead = None
    if prefetcher is not None and num_ahead:
        ahead = Ahead(prefetcher, recorded.num_experts, num_ahead, gates)
    for number, text in enumerate(recorded.texts):
        outlook = recorded.outlooks[number] if recorded.outlooks else {}
        rows = recorded.tokens[number] if recorded.tokens else ()
        cache.begin()
        if prefetcher is not None:
            prefetcher.begin()
        for token, calls in enumerate(_by_token(text)):
            spent = stalled = 0.0
            for call in calls:
                place = token, call.layer
                x = rows[call.layer][token : token + 1] if rows else _NO_TOKENS
                took, waited = _run(machine, call, x, rates, recorded.expert_num_bytes, ahead)
                spent, stalled = spent + took, stalled + waited
            made.token_ms.append(1000 * spent)
            made.stall_ms.append(1000 * stalled)
    made.statistics, made.guessed, made.late = machine.statistics, machine.guessed, machine.late
    made.is_off = ahead is not None and ahead.is_off
    return made


def _run(
    machine: Machine, call: Call, x: Tensor, rates: Rates, expert_bytes: int, ahead: Ahead | None
) -> tuple[float, float]:
    """One layer: the seconds it takes, and those in which it waits for the disk."""
    reading = machine.need(call) / rates.disk_bytes_per_s
    if ahead is not None:
        ahead.look(machine, call.layer, call.experts, x)
    multiplying = len(call.experts) * expert_bytes / rates.memory_bytes_per_s
    # What comes last is multiplied when nothing else is left to do meanwhile.
    last = expert_bytes / rates.memory_bytes_per_s if reading else 0.0
    experts = max(reading + last, multiplying)
    other = rates.other_bytes / rates.memory_bytes_per_s
    machine.idle(experts - reading + other)
    return experts + other, experts - multiplying


def _by_token(text: Sequence[Call]) -> Iterator[list[Call]]:
    """The calls of each token: a new one begins where the layers begin anew."""
    starts, token, last = [], -1, -1
    for call in text:
        token += last < 0 or call.layer <= last
        last = call.layer
        starts.append(token)
    for _, run in groupby(zip(starts, text, strict=True), lambda pair: pair[0]):
        yield [call for _, call in run]


@final
class Foresight(Prefetcher):
    """Knows the future: what can be had by guessing at all. No model can run with it."""

    def __init__(self, recorded: Recorded, distance: int = 3) -> None:
        self._calls = [call for text in recorded.texts for call in text]
        self._distance = distance
        self._at = -1

    def guess(self, sight: Sight) -> Sequence[Key]:
        self._at += 1
        coming = self._calls[self._at + 1 : self._at + 1 + self._distance]
        return [Key(call.layer, e) for call in coming if call.layer != sight.layer for e in call.experts]
