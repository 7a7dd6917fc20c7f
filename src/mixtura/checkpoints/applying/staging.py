"""A new directory that is finished or absent: built beside its place, moved there by one rename.

While a checkpoint is written it lies in ``<out>.partial``: ``journal.json`` (the terms it is written
under) and ``model/``. A file in ``model/`` has its own name only when all its bytes are on the disk, so
whatever stops the process, the same command goes on with the files that lack. Repeating the terms
gives the same bytes; other terms are refused.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

from mixtura.checkpoints.applying.shards import UNFINISHED_SUFFIX, Shard, sync_folder, write_text
from mixtura.errors import OutputError
from mixtura.report.units import format_bytes

PARTIAL_SUFFIX = ".partial"
_JOURNAL = "journal.json"
_MODEL = "model"
_LOCK = "lock"
# Room for the small files beside the weights and for what the file system keeps for itself.
_SLACK_BYTES = 1 << 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What decides the bytes that are written; all of it must be the same for work to be continued."""

    plan: str
    source: str
    source_name: str
    name: str
    shard_bytes: int
    threads: int
    mixtura: str

    def differences(self, begun: dict[str, Any]) -> list[str]:
        """What differs from the terms that a journal holds, in words."""
        own = asdict(self)
        return [
            f"{_WORDS[name]} ({begun.get(name)} then, {own[name]} now)"
            for name in own
            if begun.get(name) != own[name]
        ]


_WORDS = {
    "plan": "the plan",
    "source": "the source's digest",
    "source_name": "the source's name",
    "name": "the result's name",
    "shard_bytes": "shard_bytes",
    "threads": "the number of threads",
    "mixtura": "the version of mixtura",
}


@final
class Staging:
    """The place a checkpoint is built in. Use as a context; `publish` moves it to where it belongs.

    Raises:
        OutputError: the output directory exists or cannot be written, or its partial directory was
            begun on other terms or is being written by another process.
    """

    def __init__(self, out: Path, terms: Terms) -> None:
        self.out = out.expanduser().absolute()
        self.partial = self.out.with_name(self.out.name + PARTIAL_SUFFIX)
        self.model = self.partial / _MODEL
        self._terms = terms
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Staging:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._begin_or_continue()
        except OSError as error:
            self._release()
            raise self.failure(error) from None
        except OutputError:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    @property
    def was_published(self) -> bool:
        """Whether an earlier run moved the checkpoint to its place and was stopped right after."""
        return not self.model.exists() and _has_content(self.out)

    def finished(self, shards: tuple[Shard, ...]) -> list[Shard]:
        """The shards that are written whole; files that are not are removed."""
        kept = [shard for shard in shards if _is_whole(self.model / shard.name, shard)]
        names = {shard.name for shard in kept}
        for path in self.model.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return kept

    def check_space(self, num_bytes: int) -> None:
        """Raise `OutputError` unless the disk has room for so many more bytes."""
        free = shutil.disk_usage(self.partial).free
        needed = num_bytes + _SLACK_BYTES
        if free < needed:
            raise OutputError(
                f"{self.out.parent} has {format_bytes(free)} free and writing {self.out.name} needs "
                f"{format_bytes(needed)}; free {format_bytes(needed - free)} there or choose another "
                f"output directory"
            )

    def publish(self) -> Path:
        """Move the finished checkpoint to its place in one step and remove what is left over."""
        if not self.was_published:
            sync_folder(self.model)
            self.model.replace(self.out)
            sync_folder(self.out.parent)
        self.discard()
        return self.out

    def discard(self) -> None:
        """Remove the partial directory with all that was written.

        The journal goes last: stopped on the way, what is left still says whose it is.
        """
        self._release()
        shutil.rmtree(self.model, ignore_errors=True)
        with suppress(OSError):
            for path in sorted(self.partial.iterdir(), key=lambda path: path.name == _JOURNAL):
                path.unlink()
            self.partial.rmdir()

    def drop_unfinished(self) -> None:
        """Give back the space of files that were not finished, and of all if none was."""
        if self.model.is_dir():
            for path in self.model.glob(f"*{UNFINISHED_SUFFIX}"):
                path.unlink()
            if any(self.model.iterdir()):
                return
        self.discard()

    def failure(self, error: OSError) -> OutputError:
        """What went wrong with writing, as one sentence with what to do."""
        return OutputError(
            f"writing {self.out} failed: {error.strerror or error}; make room or choose another output "
            f"directory, then give the same command again (shards already written are kept in "
            f"{self.partial} and used again; delete it to start anew)"
        )

    def how_to_continue(self) -> str:
        """What to tell someone who interrupted the work."""
        return (
            f"{self.partial} keeps the shards already written: the same command again continues there, "
            f"or delete it"
        )

    def _begin_or_continue(self) -> None:
        journal = self.partial / _JOURNAL
        if not journal.is_file():
            known = {_LOCK, _MODEL, _JOURNAL + UNFINISHED_SUFFIX}
            foreign = sorted({path.name for path in self.partial.iterdir()} - known)
            if foreign or _has_content(self.model):
                raise OutputError(
                    f"{self.partial} exists and holds {(foreign or [_MODEL])[0]}, which mixtura did not "
                    f"write; delete it or choose another output directory"
                )
            if _has_content(self.out):
                self.discard()
                raise _exists(self.out)
            # The folder first: a journal without it then means that the folder was moved to its place.
            self.model.mkdir(exist_ok=True)
            write_text(journal, json.dumps(asdict(self._terms), indent=1, sort_keys=True) + "\n")
            sync_folder(self.partial)
            return
        self.check_terms()
        if not _has_content(self.out):
            self.model.mkdir(exist_ok=True)
        elif self.model.exists():
            raise _exists(self.out)

    def check_terms(self) -> None:
        """Raise `OutputError` if work was begun here on other terms; says which differ."""
        journal = self.partial / _JOURNAL
        if not journal.is_file():
            return
        try:
            begun = json.loads(journal.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            begun = {}
        different = self._terms.differences(begun)
        if different:
            raise OutputError(
                f"{self.partial} was begun with other settings: {', '.join(different)}; repeat the first "
                f"ones to continue, or delete {self.partial} to start anew"
            )

    def _take_lock(self) -> None:
        self._lock = (self.partial / _LOCK).open("wb")
        with suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"another process is writing {self.out} just now; wait for it or choose another "
                    f"output directory"
                ) from None

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def check_place(out: Path, source: Path) -> None:
    """Raise `OutputError` unless a new directory can be made of `out`, outside the source.

    A directory that an earlier run moved to its place just before it was stopped is let through.
    """
    check_apart(out, source)
    out = out.expanduser().absolute()
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    if (out.exists() and not out.is_dir()) or (_has_content(out) and not partial.is_dir()):
        raise _exists(out)
    if not _is_writable(out):
        raise OutputError(f"{out} cannot be written: no permission; choose another output directory")


def check_apart(out: Path, source: Path) -> None:
    """Raise `OutputError` where an output directory would be the source or in it."""
    out = out.expanduser().absolute()
    resolved, inside = out.resolve(), source.resolve()
    if resolved == inside or inside in resolved.parents:
        raise OutputError(
            f"the output directory {out} is the source or lies inside it, and the source is never changed; "
            f"choose another"
        )


def _exists(out: Path) -> OutputError:
    return OutputError(f"{out} exists and is never overwritten; delete it or choose another output directory")


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _is_writable(path: Path) -> bool:
    """Whether the nearest folder above that exists may be written to."""
    nearest = next(parent for parent in path.parents if parent.exists())
    return os.access(nearest, os.W_OK | os.X_OK)


def _is_whole(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.num_bytes:
        return False
    with path.open("rb") as stream:
        return stream.read(len(shard.header)) == shard.header
