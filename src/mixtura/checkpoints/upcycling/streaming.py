"""A model that is written beside its place, from parts of another, and takes it in one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mixtura.checkpoints.applying.shards import Shard, index_json, write_text
from mixtura.checkpoints.applying.side_files import copy_side_files, side_files
from mixtura.checkpoints.applying.staging import Staging
from mixtura.checkpoints.applying.writing import failures_handled, write_shards
from mixtura.checkpoints.viewing.weight_files import INDEX_FILE


def stream(
    staging: Staging,
    source: Path,
    shards: tuple[Shard, ...],
    write_own_files: Callable[[Path], None],
    *,
    progress: bool,
) -> Path:
    """Write shards, their index, the source's side files and what is the new model's own, and publish them.

    Stopped work is continued by the same call, to the same bytes.

    Args:
        staging: where it is written, and for where.
        source: the model whose side files go along.
        shards: of `pack_shards`.
        write_own_files: writes the rest into the directory that it is given.
        progress: whether to show a progress bar on standard error.

    Raises:
        OutputError: the place is taken, or cannot be written.
    """
    staging.check_terms()
    with staging:
        if not staging.was_published:
            with failures_handled(staging):
                small = side_files(source)
                room = sum((source / path).stat().st_size for path in small)
                write_shards(staging, shards, room, progress=progress, workers=1)
                copy_side_files(source, small, staging.model)
                if len(shards) > 1:
                    write_text(staging.model / INDEX_FILE, index_json(shards))
                write_own_files(staging.model)
        return staging.publish()
