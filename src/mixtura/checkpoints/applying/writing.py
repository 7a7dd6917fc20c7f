"""Writing shards into a staging directory: what is kept when it fails, room on the disk, progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mixtura.checkpoints.applying.shards import Shard
from mixtura.checkpoints.applying.staging import Staging
from mixtura.errors import OutputError, UserError
from mixtura.report.screen import screen


@contextmanager
def failures_handled(staging: Staging) -> Iterator[None]:
    """Leave behind what can be continued, and say how; remove what cannot."""
    try:
        yield
    except OutputError:
        staging.drop_unfinished()
        raise
    except UserError:
        staging.discard()
        raise
    except OSError as error:
        failure = staging.failure(error)
        staging.drop_unfinished()
        raise failure from None
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(staging.how_to_continue())
        raise


def write_shards(
    staging: Staging, shards: tuple[Shard, ...], room: int, *, progress: bool, workers: int
) -> None:
    """Write the shards that are not there yet, if there is room for them and `room` bytes more."""
    finished = staging.finished(shards)
    names = {shard.name for shard in finished}
    waiting = [shard for shard in shards if shard.name not in names]
    staging.check_space(sum(shard.num_bytes for shard in waiting) + room)
    total = sum(shard.num_bytes for shard in shards)
    with _progress_bar(staging.out.name, total, shown=progress) as advance:
        advance(sum(shard.num_bytes for shard in finished))
        if workers == 1:
            for shard in waiting:
                shard.write(staging.model, advance)
            return
        _write_at_once(waiting, staging.model, advance, workers)


def _write_at_once(shards: list[Shard], folder: Path, advance: Callable[[int], None], workers: int) -> None:
    """Write several shards at a time; the first error or an interrupt stops them all."""
    stopped = threading.Event()

    def advance_or_stop(num_bytes: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        advance(num_bytes)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(shard.write, folder, advance_or_stop) for shard in shards]
        try:
            wait(futures, return_when="FIRST_EXCEPTION")
        finally:
            stopped.set()
            for future in futures:
                future.cancel()
    for future in futures:
        if future.done() and not future.cancelled() and not isinstance(future.exception(), _StoppedError):
            future.result()


class _StoppedError(Exception):
    """Another shard failed, so this one is not finished."""


@contextmanager
def _progress_bar(name: str, total_bytes: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; what is yielded moves it on by so many bytes."""
    size = DownloadColumn(binary_units=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), size, TimeRemainingColumn())
    with Progress(*columns, console=screen(stderr=True), disable=not shown) as bar:
        task = bar.add_task(f"writing {name}", total=total_bytes)

        def advance(num_bytes: int) -> None:
            bar.advance(task, num_bytes)

        yield advance
