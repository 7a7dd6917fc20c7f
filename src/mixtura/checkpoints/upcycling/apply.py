"""Applying a plan to dense checkpoints: a new MoE checkpoint directory, the sources untouched.

As in `mixtura.checkpoints.apply`, one shard is written at a time with one expert in memory, the result is
there whole or not at all, and stopped work is continued by the same call, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mixtura
from mixtura.checkpoints.applying.shards import Shard, index_json, pack_shards, write_text
from mixtura.checkpoints.applying.side_files import copy_side_files, side_files
from mixtura.checkpoints.applying.staging import Staging, Terms, check_apart, check_place
from mixtura.checkpoints.applying.writing import failures_handled, write_shards
from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.packed import PLAN_FILE
from mixtura.checkpoints.upcycling.blueprint import Blueprint, blueprint
from mixtura.checkpoints.upcycling.targets import OWN
from mixtura.checkpoints.viewing.disk import DiskView
from mixtura.checkpoints.viewing.weight_files import INDEX_FILE
from mixtura.errors import CheckpointError, MixturaError, SettingError, UserError
from mixtura.types import Plan

DEFAULT_SHARD_BYTES = 5 * 10**9
ARRAYS_FILE = "plan_arrays"


def apply_upcycling(
    plan: Plan,
    arrays: Mapping[str, Tensor],
    sources: Sequence[DenseView],
    out: Path,
    *,
    card: str = "",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write the MoE checkpoint that `plan` makes of dense ones, to `out`.

    The result is an ordinary checkpoint of the family that the plan names. Tokenizer and other small files
    of the first source go along; a model card and ``plan.json`` are written.

    Args:
        plan: what to do; made for these sources, whose digests it holds in their order.
        arrays: what its actions name.
        sources: the dense models; only read.
        out: the new directory; must not exist or be empty.
        card: text of the model card.
        shard_bytes: largest size of a weights file.
        progress: whether to show a progress bar on standard error.

    Returns:
        `out`.

    Raises:
        CheckpointError: a source is damaged.
        UserError: the plan was made for other checkpoints or does not fit them.
        OutputError: `out` exists, is in a source, cannot be written, is too small for the result, or stopped
            work there was begun with another plan or other sources.
    """
    out = Path(out)
    if shard_bytes < 1:
        raise SettingError(f"shard_bytes must be at least 1, got {shard_bytes}")
    check_places(out, [view.path for view in sources])
    terms = _terms(plan, sources, card, out, shard_bytes)
    staging = Staging(out, terms)
    staging.check_terms()
    made = blueprint(sources, plan, arrays)
    shards = pack_shards(made.units, shard_bytes)
    with staging:
        if not staging.was_published:
            with failures_handled(staging):
                small = side_files(sources[0].path)
                room = sum((sources[0].path / path).stat().st_size for path in small)
                write_shards(staging, shards, room, progress=progress, workers=1)
                copy_side_files(sources[0].path, small, staging.model)
                _write_own_files(staging.model, shards, plan, made, card)
        return staging.publish()


def check_places(out: Path, sources: Sequence[Path]) -> None:
    """Refuse a place that cannot be written or lies in a source.

    Raises:
        OutputError: says which.
    """
    check_place(out, sources[0])
    for source in sources[1:]:
        check_apart(out, source)


def save_plan(folder: Path, plan: Plan, arrays: Mapping[str, Tensor]) -> None:
    """Keep a plan and its arrays in a folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{ARRAYS_FILE}.unfinished"
    save_file({name: values.contiguous() for name, values in arrays.items()}, unfinished)
    unfinished.replace(folder / f"{ARRAYS_FILE}.safetensors")
    # Last: where it is there, so are the arrays.
    write_text(folder / PLAN_FILE, plan.to_json())


def load_plan(folder: Path) -> tuple[Plan, dict[str, Tensor]] | None:
    """What `save_plan` kept; None where there is nothing whole."""
    try:
        plan = Plan.from_json((folder / PLAN_FILE).read_text(encoding="utf-8"))
        return plan, load_file(folder / f"{ARRAYS_FILE}.safetensors")
    except (OSError, UserError, CheckpointError):
        return None


def digests(sources: Sequence[DenseView]) -> tuple[str, ...]:
    """The digests of sources, in order."""
    return tuple(checkpoint_digest(view.path) for view in sources)


def _terms(plan: Plan, sources: Sequence[DenseView], card: str, out: Path, shard_bytes: int) -> Terms:
    found, wanted = digests(sources), (plan.source_digest, *plan.other_digests)
    if found != wanted:
        raise UserError(
            f"the plan was made for checkpoints with the digests {', '.join(wanted)}, and these have "
            f"{', '.join(found)}; give the checkpoints it was made for, in the same order"
        )
    return Terms(
        plan=sha256(plan.to_json().encode() + card.encode()).hexdigest(),
        source=" ".join(found),
        source_name=", ".join(view.path.name for view in sources),
        name=out.absolute().name,
        shard_bytes=shard_bytes,
        threads=torch.get_num_threads(),
        mixtura=mixtura.__version__,
    )


def _write_own_files(folder: Path, shards: tuple[Shard, ...], plan: Plan, made: Blueprint, card: str) -> None:
    write_text(folder / "config.json", made.config.to_json_string())
    write_text(folder / PLAN_FILE, plan.to_json())
    if len(shards) > 1:
        write_text(folder / INDEX_FILE, index_json(shards))
    write_text(folder / "README.md", card)
    try:
        # A model of mixtura's own is opened by its own reader, where it is tried.
        if made.target.model_type != OWN:
            DiskView(folder)
    except UserError as error:
        raise MixturaError(f"what was written to {folder} does not open: {error}") from error
