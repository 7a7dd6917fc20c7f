"""The engine: one thread that runs all requests through the model, together, a step at a time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.errors import CheckpointError, UnmetError
from mixtura.report.units import format_bytes
from mixtura.running.decoding import StopStrings, decoding_config
from mixtura.running.memory.available import available_bytes
from mixtura.serving.engine.caches import measured_cost
from mixtura.serving.engine.counting import Counts
from mixtura.serving.engine.deciding import Steers
from mixtura.serving.engine.lanes import Lane
from mixtura.serving.engine.passing import Passes
from mixtura.serving.engine.picking import default_temperature, end_ids_of
from mixtura.serving.engine.prefixes import Prefixes
from mixtura.serving.engine.records import (
    Adapters,
    Asked,
    BusyError,
    ClosingError,
    OnPiece,
    TooLongError,
)
from mixtura.serving.engine.rows import Row

# How long the engine sleeps when there is nothing to do; whoever brings work wakes it.
_IDLE_S: Final = 0.5
_LEAST_RETRY_S, _MOST_RETRY_S = 1, 60
# Full contexts that the memory for caches holds where nobody says how large it is to be.
DEFAULT_TEXTS: Final = 4


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the engine takes on.

    Attributes:
        context: tokens of prompt and answer together, of one request.
        running: requests that run together.
        waiting: requests that wait for their turn; more are refused with `BusyError`.
    """

    context: int
    running: int = 16
    waiting: int = 64


@final
class Engine:
    """Runs requests through a model, several at once; a request comes and goes between any two steps.

    Each step reads a part of one prompt, so that no long prompt keeps others from their tokens, then gives
    every running text one token. Who comes first starts first, once its memory can be set apart.

    Args:
        model: a causal language model; nobody else may run it meanwhile.
        tokenizer: the model's.
        prefixes: the memory for caches.
        limits: what to take on.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, passes: Passes, prefixes: Prefixes, limits: Limits
    ) -> None:
        self.model = model
        self.limits = limits
        self.prefixes = prefixes
        self.passes = passes
        self.counts = Counts()
        self._tokenizer = tokenizer
        self.end_ids = end_ids_of(model)
        self._stops = StopStrings(model, tokenizer, 0).strings
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        # Logits behind the last token, in each way that the model runs on a text.
        self._said: dict[Lane, Float[Tensor, " V"]] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_closing = False
        self._is_over = False
        self._thread = threading.Thread(target=self._serve, name="mixtura-engine", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Requests that run now."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._is_closing

    def submit(self, asked: Sequence[Asked], on_pieces: Sequence[OnPiece]) -> Callable[[], None]:
        """Queue requests, all or none; returns a function that takes them back. For any thread.

        Raises:
            TooLongError: one is longer than the server can hold.
            BusyError: too many wait already.
            ClosingError: the server is being shut down.
        """
        for one in asked:
            self.check(one)
        rows = [
            Row(replace(one, stops=one.stops + self._stops), on_piece, self._tokenizer, self.end_ids)
            for one, on_piece in zip(asked, on_pieces, strict=True)
        ]
        with self._lock:
            if self._is_closing:
                raise ClosingError("the server is being shut down; send the request to another one, or later")
            free = max(0, self.limits.running - len(self._running))
            # An idle server takes a request however many texts it asks for.
            if len(self._waiting) + len(rows) > self.limits.waiting + free and (
                self._waiting or self._running
            ):
                self.counts.ended("refused")
                raise BusyError(
                    f"{len(self._running)} requests run and {len(self._waiting)} wait, which is as many as "
                    "this server takes; try again later",
                    self.retry_after_s(),
                )
            self._waiting.extend(rows)
        self._wake.set()
        return lambda: self._cancel(rows)

    def check(self, asked: Asked) -> None:
        """Refuse a request that no amount of waiting helps.

        Raises:
            TooLongError: it is longer than the context, or than the memory for caches.
        """
        prompt, new = len(asked.prompt), asked.max_new_tokens
        if prompt + new > self.limits.context:
            raise TooLongError(
                f"the prompt has {prompt} tokens and the answer may have {new}, which together are more than "
                f"this server's context of {self.limits.context}; shorten the prompt or lower max_tokens"
            )
        cost, limit = self.prefixes.cost, self.prefixes.limit_bytes
        if cost.of(prompt + new) > limit:
            raise TooLongError(
                f"the prompt's {prompt} tokens and {new} of the answer are more than the "
                f"{cost.tokens_in(limit)} that this server has memory for; shorten the prompt or lower "
                "max_tokens"
            )

    def retry_after_s(self) -> int:
        """When a refused request may find room, by the tokens that are still to come and today's rate."""
        rows = [*self._running, *self._waiting]
        left = sum(max(row.asked.max_new_tokens - row.num_new, 1) for row in rows)
        rate = self.counts.tokens_per_second() or 10.0
        return int(min(max(left / rate / max(len(rows), 1), _LEAST_RETRY_S), _MOST_RETRY_S))

    def close(self, grace_s: float) -> bool:
        """Take no more requests, let those that there are end, then stop; whether all did in time."""
        with self._lock:
            self._is_closing = True
        deadline = time.monotonic() + grace_s
        while (self._running or self._waiting) and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        done = not (self._running or self._waiting)
        self._is_over = True
        self._wake.set()
        self._thread.join(timeout=60)
        return done

    def _cancel(self, rows: Sequence[Row]) -> None:
        for row in rows:
            row.is_cancelled = True
        self._wake.set()

    def _serve(self) -> None:
        # Gradients are off by thread.
        torch.set_grad_enabled(False)
        while not self._is_over:
            if not self._running and not self._waiting:
                self._wake.wait(_IDLE_S)
            self._wake.clear()
            try:
                self._drop_cancelled()
                self._admit()
                self._read()
                self._step()
            except Exception as error:
                # A fault of ours must leave nobody waiting, nor the server without an engine.
                for row in [*self._running]:
                    self._fail(row, error)
        for row in [*self._running, *self._waiting]:
            self._fail(row, ClosingError("the server was shut down before the answer was complete"))

    def _drop_cancelled(self) -> None:
        with self._lock:
            gone = [row for row in (*self._running, *self._waiting) if row.is_cancelled]
        for row in gone:
            self._end(row, row.finish("cancelled"))

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.limits.running:
            row = self._waiting[0]
            if self._sibling_reads(row):
                return
            try:
                self._open(row)
                if not self.prefixes.admit(row.lanes, self._lanes()):
                    return
                row.start(self.model)
            except Exception as error:
                self._fail(row, error)
                continue
            with self._lock:
                self._waiting.popleft()
                self._running.append(row)
            self.counts.cached_tokens += row.num_cached

    def _open(self, row: Row) -> None:
        """Let a row's decoder say in which ways the model runs on it.

        Raises:
            UserError: the model does not suit the decoder.
            TooLongError: in so many ways there is no memory for it.
        """
        if row.is_open:
            return
        row.open(self.passes.steers.open(row.asked, default_temperature(self.model)))
        needed = sum(self.prefixes.cost.of(lane.room) for lane in row.lanes)
        if needed > self.prefixes.limit_bytes:
            raise TooLongError(
                f"the decoder runs the model in {len(row.lanes)} ways at once, whose keys and values take "
                f"{format_bytes(needed)} of the {format_bytes(self.prefixes.limit_bytes)} that this server "
                "has for them; shorten the prompt or lower max_tokens"
            )

    def _lanes(self) -> list[Lane]:
        return [lane for row in self._running for lane in row.lanes]

    def _sibling_reads(self, row: Row) -> bool:
        """Whether another of its group reads the prompt just now, which it then need not do."""
        group = row.asked.group
        return group is not None and any(
            one.asked.group is group and one.is_reading and not one.asked.reads_prompt
            for one in self._running
        )

    def _read(self) -> None:
        """The next part of the first prompt that is still to be read."""
        row = next((one for one in self._running if one.is_reading), None)
        if row is None:
            return
        lane = next(lane for lane in row.lanes if lane.is_reading)
        before = lane.num_read
        try:
            logits = self.passes.read(lane)
        except Exception as error:
            self._fail(row, error)
            return
        self.counts.prompt_tokens += lane.num_read - before
        if row.asked.reads_prompt:
            row.see_prompt(logits, before)
        if not lane.is_reading:
            self._said[lane] = logits[-1]
        if not row.is_reading:
            self._grow(row)

    def _step(self) -> None:
        rows = [row for row in self._running if not row.is_reading and row.num_new]
        lanes = [lane for row in rows for lane in row.lanes]
        for part in self.passes.parts(lanes) if lanes else ():
            self.counts.steps += 1
            self.counts.step_rows += len(part)
            self._stepped(part)
        for row in rows:
            if row in self._running:
                self._grow(row)

    def _stepped(self, lanes: Sequence[Lane]) -> None:
        """A step of some texts; those that it fails for are ended."""
        # Another of a text's ways may have failed before.
        lanes = [lane for lane in lanes if lane.cache is not None]
        if not lanes:
            return
        try:
            for lane, logits in zip(lanes, self.passes.step(lanes), strict=True):
                self._said[lane] = logits
        except CheckpointError as error:
            if len(lanes) == 1:
                self._fail_of(lanes, error)
                return
            # Only who needs what cannot be read fails for it.
            for lane in lanes:
                self._stepped([lane])
        except Exception as error:
            self._fail_of(lanes, error)

    def _fail_of(self, lanes: Sequence[Lane], error: Exception) -> None:
        for row in [row for row in self._running if any(lane in lanes for lane in row.lanes)]:
            self._fail(row, error)

    def _grow(self, row: Row) -> None:
        try:
            before = row.num_new
            why = row.grow([self._said.pop(lane) for lane in row.lanes])
        except Exception as error:
            self._fail(row, error)
            return
        if row.num_new > before:
            now = time.perf_counter()
            if row.last_token_at is None:
                self.counts.first_token.add(now - row.asked_at)
            else:
                self.counts.between.add(now - row.last_token_at)
            row.last_token_at = now
            self.counts.saw_tokens(1)
        if why is not None:
            self._end(row, why)

    def _fail(self, row: Row, error: Exception) -> None:
        row.fail(error)
        self._end(row, "failed")

    def _end(self, row: Row, how: str) -> None:
        with self._lock:
            if row in self._running:
                self._running.remove(row)
            elif row in self._waiting:
                self._waiting.remove(row)
        try:
            for lane in row.lanes:
                self.prefixes.release(lane)
                self._said.pop(lane, None)
            if not any(lane.view.steering for lane in self._lanes()):
                self.passes.steers.rest()
            self.counts.ended(how)
        finally:
            # Whoever hears of the end may count on the memory being free.
            row.tell_end()


def engine_of(
    model: PreTrainedModel,
    tokenizer: Any,
    limits: Limits,
    cache_bytes: int | None = None,
    *,
    keeps_prefixes: bool = True,
    adapters: Adapters | None = None,
    calibrations: Sequence[Path] = (),
) -> Engine:
    """An engine that runs.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        limits: what to take on.
        cache_bytes: for the caches of all texts; by default what four texts of the whole context take.
        keeps_prefixes: whether beginnings are kept to not be read again.
        adapters: on the model, of which requests choose.
        calibrations: files that decoders read.

    Raises:
        UserError: the model cannot generate.
        UnmetError: so much memory is not free, or too little for one text of the context.
    """
    decoding_config(model)
    cost = measured_cost(model)
    limit = DEFAULT_TEXTS * cost.of(limits.context) if cache_bytes is None else cache_bytes
    if cost.of(limits.context) > limit:
        raise UnmetError(
            f"{format_bytes(limit)} for keys and values are too little for one text of {limits.context} "
            f"tokens, which takes {format_bytes(cost.of(limits.context))}; give more, or a shorter context"
        )
    if limit > available_bytes():
        raise UnmetError(
            f"{format_bytes(limit)} for keys and values are more than the {format_bytes(available_bytes())} "
            "that are free; give less, or a shorter context"
        )
    prefixes = Prefixes(model, cost, limit, keeps=keeps_prefixes)
    passes = Passes(model, Steers(model, tokenizer, calibrations, adapters), adapters)
    return Engine(model, tokenizer, passes, prefixes, limits)
