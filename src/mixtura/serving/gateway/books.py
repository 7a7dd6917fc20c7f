"""The ledger for many requests at once: one thread writes, and what waits goes in one transaction."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar, final

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from mixtura.errors import MixturaError
from mixtura.serving.gateway import ledger
from mixtura.serving.gateway.ledger import Hold, Settled

T = TypeVar("T")
_MOST_AT_ONCE: Final = 256
_BEAT_S: Final = 5.0
_logger = logging.getLogger("mixtura")


class LedgerError(MixturaError):
    """The ledger cannot be written just now, so nothing may be spent."""


@final
@dataclass(slots=True)
class _Work:
    """One thing to do in a transaction, and who waits for it.

    Attributes:
        account: whose; work is done in their order, so that two processes never wait for each other.
    """

    account: str
    do: Callable[[sa.Connection], Any]
    done: Future[Any] = field(default_factory=Future)


@final
class Books:
    """A ledger with its thread.

    Args:
        engine: the database.
        owner: a name for this process that no other has had.
        charge: whether calls of killed processes are charged in full.
    """

    def __init__(self, engine: sa.Engine, owner: str, *, charge: bool = True) -> None:
        self.owner = owner
        self._engine = engine
        self._charge = charge
        self._waiting: SimpleQueue[_Work | None] = SimpleQueue()
        self._late: list[tuple[str, Settled, int | None]] = []
        self._opened: set[str] = set()
        self._alive()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._thread.start()

    async def reserve(self, hold: Hold, budget: int | None) -> bool:
        """Set aside what a call may cost; False where the budget has no room for it.

        Raises:
            LedgerError: the ledger cannot be written.
        """
        is_new = hold.account not in self._opened

        def do(connection: sa.Connection) -> bool:
            if is_new:
                ledger.open_account(connection, hold.account)
            return ledger.reserve(connection, hold, budget)

        done = await self.run(do, hold.account)
        self._opened.add(hold.account)
        return done

    async def settle(self, which: str, account: str, call: Settled, budget: int | None) -> int:
        """Note what a call came to; what was charged. If the ledger cannot be written now, it is later."""
        try:
            return await self.run(partial(_settle, which=which, call=call, budget=budget), account)
        except LedgerError:
            self._late.append((which, call, budget))
            return call.cost

    async def run(self, do: Callable[[sa.Connection], T], account: str = "") -> T:
        """Do something in a transaction.

        Raises:
            LedgerError: it cannot be done.
        """
        work = _Work(account, do)
        self._waiting.put(work)
        try:
            result: T = await asyncio.wrap_future(work.done)
        except SQLAlchemyError as error:
            _logger.error("the ledger cannot be written: %s", getattr(error, "orig", error))
            raise LedgerError(
                "the ledger cannot be written just now; nothing was spent, so try again"
            ) from None
        return result

    def close(self) -> None:
        """Write what waits, and end."""
        self._waiting.put(None)
        self._thread.join()
        with contextlib.suppress(SQLAlchemyError), self._engine.begin() as connection:
            ledger.retire(connection, self.owner)
        self._engine.dispose()

    def _work(self) -> None:
        while True:
            try:
                first = self._waiting.get(timeout=_BEAT_S)
            except Empty:
                self._guarded_beat()
                continue
            batch = [first]
            while len(batch) < _MOST_AT_ONCE:
                try:
                    batch.append(self._waiting.get_nowait())
                except Empty:
                    break
            self._write([one for one in batch if one is not None])
            if None in batch:
                self._write_late()
                return
            self._guarded_beat()

    def _write(self, batch: list[_Work]) -> None:
        """All of a batch at once; each alone where that fails, so that nobody fails for others."""
        ordered = sorted(batch, key=lambda work: work.account)
        try:
            self._write_at_once(ordered)
        except Exception:
            for work in ordered:
                if not work.done.done():
                    try:
                        self._write_at_once([work])
                    except Exception as error:
                        work.done.set_exception(error)

    def _write_at_once(self, batch: list[_Work]) -> None:
        if not batch:
            return
        with self._engine.begin() as connection:
            results = [work.do(connection) for work in batch]
        for work, result in zip(batch, results, strict=True):
            # Who waited may have gone.
            if work.done.set_running_or_notify_cancel():
                work.done.set_result(result)

    def _guarded_beat(self) -> None:
        now = time.monotonic()
        if now - self._beat_at >= _BEAT_S:
            try:
                self._alive()
                self._write_late()
            except SQLAlchemyError as error:
                _logger.error("the ledger cannot be written: %s", getattr(error, "orig", error))

    def _alive(self) -> None:
        """Say that this process lives, and settle for those that do not any more."""
        with self._engine.begin() as connection:
            ledger.beat(connection, self.owner)
            num = ledger.recover(connection, charge=self._charge)
        self._beat_at = time.monotonic()
        if num:
            how = "charged in full" if self._charge else "released"
            _logger.warning("%d calls of a gateway that was killed are %s", num, how)

    def _write_late(self) -> None:
        for late in list(self._late):
            which, call, budget = late
            with self._engine.begin() as connection:
                ledger.settle(connection, which, call, budget)
            self._late.remove(late)


def _settle(connection: sa.Connection, which: str, call: Settled, budget: int | None) -> int:
    return ledger.settle(connection, which, call, budget)
