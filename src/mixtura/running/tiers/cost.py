"""What running a model in little memory will be like, told beforehand: for this machine or for another.

The model chooses experts on a text; those choices are run through the cache that it would have, at the rates
of the disk and of memory. Both are measured here unless others are given, and so is, where the machine is
this one, how fast the model really is on the same tokens.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.errors import SettingError
from mixtura.kernels.rates import memory_bytes_per_second
from mixtura.machine.releases import returned_cache, with_cache
from mixtura.report.units import parse_bytes
from mixtura.running.loading import load
from mixtura.running.memory.accounting import account
from mixtura.running.memory.available import available_bytes
from mixtura.running.tiers.choosing import cache_of
from mixtura.running.tiers.core import Tiers
from mixtura.running.tiers.opening import Wish, division_of, tiers_of
from mixtura.running.tiers.reading import Reader
from mixtura.running.tiers.recipes import Recipe
from mixtura.running.tiers.recording import Recorded, record, text_of
from mixtura.running.tiers.simulation import Rates, replay_timed

# Experts that are read to learn the disk's rate, at most so many bytes.
_PROBED: Final = 64
_PROBED_BYTES: Final = 256 << 20
# Tokens that are run for real, and those before them that fill the cache.
_MEASURED, _WARMING = 32, 8
# A gain over chance of less than this is none: experts are not needed again sooner than any others.
_HOT: Final = 0.05
# Reading aloud takes about so many tokens in a second.
_READABLE: Final = 5.0
Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What was predicted of a model within a budget, and what was measured.

    Attributes:
        num_slots: experts that there is room for.
        num_experts: of all layers.
        hit_rate: share of needed experts that were in memory, predicted.
        tokens_per_second: predicted.
        p99_ms: of a token, predicted.
        missed_bytes_per_token: read from disk while a token waits, predicted.
        disk_limit: tokens in a second that the disk allows at that; 0 where nothing is missed.
        memory_limit: tokens in a second that memory allows.
        disk_bytes_per_s: rate of the disk that was assumed or measured.
        memory_bytes_per_s: rate of memory that was assumed or measured.
        measured_tokens_per_second: on this machine, on the last of the tokens; None for another machine.
        measured_hit_rate: the same.
        compared_tokens_per_second: what was predicted for those very tokens.
        compared_hit_rate: the same.
    """

    num_slots: int
    num_experts: int
    hit_rate: float
    tokens_per_second: float
    p99_ms: float
    missed_bytes_per_token: float
    disk_limit: float
    memory_limit: float
    disk_bytes_per_s: float
    memory_bytes_per_s: float
    measured_tokens_per_second: float | None = None
    measured_hit_rate: float | None = None
    compared_tokens_per_second: float | None = None
    compared_hit_rate: float | None = None

    @property
    def chance(self) -> float:
        """The hit rate of experts that are needed without any order."""
        return min(1.0, self.num_slots / self.num_experts)

    @property
    def verdict(self) -> str:
        """Whether this pays, in a sentence."""
        if self.num_slots >= self.num_experts:
            return "all experts fit: nothing is read from disk once each was needed"
        slow = self.tokens_per_second < _READABLE
        if self.hit_rate < self.chance + _HOT:
            way = "fewer bits (mixtura fit) help, another cache does not"
            return f"there is no hot set: experts are needed again no sooner than by chance; {way}"
        if slow:
            return "it will be slower than people read; fewer bits (mixtura fit) or more memory help most"
        return "it pays: most of what is needed is in memory"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self) | {"chance": self.chance, "verdict": self.verdict}


def forecast(
    path: Path,
    wish: Wish,
    *,
    disk: str | None = None,
    ram: str | None = None,
    num_tokens: int = 256,
    say: Say = lambda line: None,
) -> Forecast:
    """Predict how a model runs within a budget, and measure it where the machine is this one.

    Args:
        path: a checkpoint directory.
        wish: how it is to run.
        disk: bytes in a second of another machine's disk, such as ``3GB``; None to measure this one's.
        ram: the same of its memory.
        num_tokens: of the text whose choices are recorded.
        say: told what is done.

    Raises:
        BudgetError: the model cannot run in so little.
        SettingError: there are too few tokens, or a rate is no size.
    """
    if num_tokens <= _WARMING:
        raise SettingError(f"at least {_WARMING + 1} tokens are needed for a forecast, got {num_tokens}")
    given = {name: _rate(name, value) for name, value in (("disk", disk), ("ram", ram)) if value}
    model = load(path, memory=wish)
    tiers, division = tiers_of(model), division_of(model)
    if tiers is None or division is None:
        raise SettingError("a forecast is of a budget; give memory, such as 8GiB")
    say("measuring the disk and memory")
    rates = Rates(
        disk_bytes_per_s=given.get("disk") or disk_rate(tiers.recipes),
        memory_bytes_per_s=given.get("ram") or memory_bytes_per_second(),
        other_bytes=other_bytes(path),
    )
    tried = None if given else _tried(model, tiers, path, num_tokens, say)
    needed, slots = account(open_checkpoint(path), wish.context).total_bytes, division.slots
    del model, tiers
    gc.collect()
    say(f"recording what the model chooses on {num_tokens} tokens")
    recorded = record(path, num_tokens, 0, memory=None if needed < available_bytes() // 2 else wish.memory)
    return _forecast(recorded, sum(plan.num_slots for plan in slots), wish.cache, rates, tried)


def _forecast(
    recorded: Recorded, num_slots: int, cache: str, rates: Rates, tried: tuple[float, float] | None
) -> Forecast:
    timed = replay_timed(recorded, cache_of(cache, num_slots), rates)
    active = sum(len(call.experts) for text in recorded.texts for call in text) / recorded.num_tokens
    read = active * recorded.expert_num_bytes + rates.other_bytes * len(recorded.num_experts)
    missed = timed.statistics.demanded_bytes / recorded.num_tokens
    compared = {}
    if tried is not None:
        speed, rate = _compared(recorded, num_slots, cache, rates)
        compared = {
            "measured_tokens_per_second": tried[0],
            "measured_hit_rate": tried[1],
            "compared_tokens_per_second": speed,
            "compared_hit_rate": rate,
        }
    return Forecast(
        num_slots=num_slots,
        num_experts=sum(recorded.num_experts),
        hit_rate=timed.statistics.hit_rate,
        tokens_per_second=timed.tokens_per_second,
        p99_ms=_p99(timed.token_ms),
        missed_bytes_per_token=missed,
        disk_limit=rates.disk_bytes_per_s / missed if missed else 0.0,
        memory_limit=rates.memory_bytes_per_s / read,
        disk_bytes_per_s=rates.disk_bytes_per_s,
        memory_bytes_per_s=rates.memory_bytes_per_s,
        **compared,
    )


def other_bytes(path: Path) -> float:
    """Weights outside routed experts that a token reads, a layer's share of them."""
    view = open_checkpoint(path)
    taken = account(view, 1)
    config = view.config.get_text_config()
    # Of an embedding a token reads one row.
    rows = int(config.vocab_size) * int(config.hidden_size)
    dtype = getattr(config, "dtype", None)
    size = dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize
    embedding = 0 if getattr(config, "tie_word_embeddings", False) else rows * size
    return max(0, taken.weights_bytes - taken.expert_bytes - embedding) / len(view.layers)


def disk_rate(recipes: Sequence[Recipe], seed: int = 0) -> float:
    """Bytes in a second, by reading experts of a model here and there as they are read when they are missing.

    Experts that must be converted are read by the checkpoint's view, and that is what is timed.
    """
    drawn = torch.Generator().manual_seed(seed)
    owners = [(recipe, expert) for recipe in recipes for expert in recipe.owners]
    order = torch.randperm(len(owners), generator=drawn).tolist()[:_PROBED]
    most = max(recipe.num_bytes(expert) for recipe, expert in owners)
    num = max(1, min(len(order), _PROBED_BYTES // max(most, 1)))
    memory = torch.empty(num, most, dtype=torch.uint8)
    reader, loads, total = Reader(), [], 0
    start = time.perf_counter()
    for place, number in enumerate(order[:num]):
        recipe, expert = owners[number]
        mine = memory[place][: recipe.num_bytes(expert)]
        ranges = recipe.ranges(expert, mine)
        total += recipe.num_bytes(expert)
        if ranges is None:
            recipe.fill(expert, mine)
        else:
            loads.append(reader.read(ranges))
    for one in loads:
        one.wait()
    return total / max(time.perf_counter() - start, 1e-9)


def _tried(model: Any, tiers: Tiers, path: Path, num_tokens: int, say: Say) -> tuple[float, float]:
    """Tokens in a second and hit rate on the first text's tokens, one by one, once the cache is filled."""
    batch = text_of(path, num_tokens, 0)
    ids = batch.input_ids[0][batch.attention_mask[0].bool()][: _WARMING + _MEASURED]
    say(f"running {len(ids)} tokens for real")
    times, cache = [], None
    for number, token in enumerate(ids):
        if number == _WARMING:
            tiers.forget_statistics()
        start = time.perf_counter()
        with torch.no_grad():
            named: dict[str, Any] = {} if cache is None else with_cache(cache)
            outputs: Any = model(input_ids=token.view(1, 1), use_cache=True, **named)
        cache = returned_cache(outputs)
        times.append(time.perf_counter() - start)
    return 1 / statistics.mean(times[_WARMING:]), tiers.statistics.hit_rate


def _compared(recorded: Recorded, num_slots: int, cache: str, rates: Rates) -> tuple[float, float]:
    """The same, as predicted for these tokens."""
    num = min(len(recorded.texts[0]) // len(recorded.num_experts), _WARMING + _MEASURED)
    warm, whole = (
        replay_timed(_first(recorded, some), cache_of(cache, num_slots), rates) for some in (_WARMING, num)
    )
    needed = whole.statistics.needed - warm.statistics.needed
    hits = whole.statistics.hits - warm.statistics.hits
    return 1000 / statistics.mean(whole.token_ms[_WARMING:]), hits / max(needed, 1)


def _first(recorded: Recorded, num_tokens: int) -> Recorded:
    calls = recorded.texts[0][: num_tokens * len(recorded.num_experts)]
    return replace(recorded, texts=(calls,), outlooks=(), num_tokens=num_tokens)


def _rate(name: str, text: str) -> float:
    found = parse_bytes(text)
    if found <= 0:
        raise SettingError(f"--{name} must be a rate in bytes a second, such as 3GB, got {text}")
    return float(found)


def _p99(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[max(0, -(-99 * len(ordered) // 100) - 1)]
