"""Applying a plan to a checkpoint directory: a new checkpoint directory, the source untouched.

One shard is written at a time and no more than one expert, or a piece of one tensor, is in memory, so
a checkpoint of any size is changed on any machine. The result is there whole or not at all; stopped
work is continued by the same call, to the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import final

import torch

import mixtura
from mixtura.checkpoints.applying.blueprint import Blueprint, blueprint
from mixtura.checkpoints.applying.card import CardFacts, MeasuredLoss, model_card, name_of_source
from mixtura.checkpoints.applying.checking import check_plan, check_source
from mixtura.checkpoints.applying.config import config_json
from mixtura.checkpoints.applying.shards import Shard, index_json, pack_shards, write_text
from mixtura.checkpoints.applying.side_files import copy_side_files, side_files
from mixtura.checkpoints.applying.staging import Staging, Terms, check_place
from mixtura.checkpoints.applying.writing import failures_handled, write_shards
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.packed import EXPERTS_FILE, PLAN_FILE
from mixtura.checkpoints.rounded import RoundedExperts
from mixtura.checkpoints.viewing.disk import DiskView
from mixtura.checkpoints.viewing.packed import PackedView
from mixtura.checkpoints.viewing.weight_files import INDEX_FILE
from mixtura.errors import MixturaError, SettingError, UserError
from mixtura.types import Plan

__all__ = ["apply_plan", "card_text", "check_plan", "planned_num_bytes"]

DEFAULT_SHARD_BYTES = 5 * 10**9


def apply_plan(
    plan: Plan,
    source: Path,
    out: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
    workers: int = 1,
    source_name: str | None = None,
    name: str | None = None,
    measured: MeasuredLoss | None = None,
    rounded: RoundedExperts | None = None,
) -> Path:
    """Write the checkpoint that `plan` makes of the one in `source`, to `out`.

    Where every layer drops the same number of experts and none is quantized, the result is an
    ordinary checkpoint of its family that plain transformers loads; otherwise it is of the mixtura
    format (`mixtura.checkpoints.packed`) and `mixtura.load` loads it. Tokenizer, generation config, chat
    templates, licence and other small files go along; a model card and ``plan.json`` are written.

    Work is done in ``<out>.partial`` and moved to `out` in one step. If it is stopped, by Ctrl-C, a
    full disk or a kill, the partial directory keeps the finished shards and the same call continues;
    the bytes are those of a run that was never stopped. If the source turns out to be damaged the
    partial directory is removed.

    Args:
        plan: what to do; made for this source (its ``source_digest`` must be the source's).
        source: a checkpoint directory; only read.
        out: the new directory; must not exist or be empty.
        shard_bytes: largest size of a weights file.
        progress: whether to show a progress bar on standard error.
        workers: shards written at the same time, each with an expert in memory; the bytes do not
            depend on it.
        source_name: what the model card calls the source (default: the hub's name or the folder's).
        name: what the model card calls the result (default: the folder's name).
        measured: what the model card says of the loss, if it was measured.
        rounded: experts that were rounded before, with calibration text; those that it does not hold are
            rounded here, without.

    Returns:
        `out`.

    Raises:
        CheckpointError: the source is damaged: a missing or truncated file, NaN in a router or expert.
        UnsupportedModelError: the source is not a model this can be done to.
        UserError: the plan was made for another checkpoint or does not fit the model.
        OutputError: `out` exists, is in the source, cannot be written, is too small for the result,
            or stopped work there was begun with another plan, source or settings.
    """
    source, out = Path(source), Path(out)
    if shard_bytes < 1 or workers < 1:
        raise SettingError(f"shard_bytes and workers must be at least 1, got {shard_bytes} and {workers}")
    check_place(out, source)
    check_source(source)
    view = DiskView(source)
    names = (source_name or name_of_source(source), name or out.absolute().name)
    terms = _terms(plan, source, shard_bytes, names)
    staging = Staging(out, terms)
    staging.check_terms()
    made = _Made(view, plan, blueprint(view, plan, rounded), terms, measured)
    shards = pack_shards(made.blueprint.units, shard_bytes)
    with staging:
        if not staging.was_published:
            with failures_handled(staging):
                small = side_files(source)
                room = sum((source / path).stat().st_size for path in small)
                write_shards(staging, shards, room, progress=progress, workers=workers)
                copy_side_files(source, small, staging.model)
                _write_own_files(staging.model, shards, made)
        return staging.publish()


def planned_num_bytes(plan: Plan, source: Path) -> int:
    """Bytes of all tensors that applying a plan would write, exactly, without writing.

    Raises:
        UserError: the plan does not fit the model.
    """
    return blueprint(DiskView(source), plan).num_bytes


def card_text(
    plan: Plan,
    source: Path,
    *,
    source_name: str,
    name: str,
    rounded: RoundedExperts | None = None,
    measured: MeasuredLoss | None = None,
) -> str:
    """The model card that `apply_plan` writes, for a loss that was measured on what it wrote.

    Args:
        plan: what was done.
        source: the checkpoint it was done to.
        source_name: what the card calls the source.
        name: what it calls the result.
        rounded: as for `apply_plan`.
        measured: the loss.
    """
    view = DiskView(source)
    return model_card(_facts(view, plan, blueprint(view, plan, rounded), (source_name, name), measured))


def _facts(
    view: DiskView, plan: Plan, made: Blueprint, names: tuple[str, str], measured: MeasuredLoss | None
) -> CardFacts:
    return CardFacts(
        name=names[1],
        source=view.path,
        source_name=names[0],
        plan=plan,
        num_experts={layer.index: layer.num_experts for layer in view.layers},
        num_bytes_before=view.num_bytes,
        num_bytes_after=made.num_bytes,
        ordinary=made.ordinary,
        left_out=made.left_out,
        measured=measured,
    )


@final
@dataclass(frozen=True, slots=True)
class _Made:
    """What the small files tell of."""

    view: DiskView
    plan: Plan
    blueprint: Blueprint
    terms: Terms
    measured: MeasuredLoss | None


def _terms(plan: Plan, source: Path, shard_bytes: int, names: tuple[str, str]) -> Terms:
    """What must be the same for stopped work to be continued.

    Raises:
        UserError: the plan was made for another checkpoint.
    """
    digest = checkpoint_digest(source)
    if plan.source_digest != digest:
        raise UserError(
            f"the plan was made for a checkpoint with digest {plan.source_digest}, but {source} has "
            f"{digest}; give the checkpoint it was made for or make a new plan"
        )
    return Terms(
        plan=sha256(plan.to_json().encode()).hexdigest(),
        source=digest,
        source_name=names[0],
        name=names[1],
        shard_bytes=shard_bytes,
        threads=torch.get_num_threads(),
        mixtura=mixtura.__version__,
    )


def _check_opens(written: Path, *, ordinary: bool) -> None:
    """What was written must open as what its config says before it is called finished."""
    try:
        if ordinary:
            DiskView(written)
        else:
            PackedView(written)
    except UserError as error:
        raise MixturaError(f"what was written to {written} does not open: {error}") from error


def _write_own_files(folder: Path, shards: tuple[Shard, ...], made: _Made) -> None:
    """The small files that are not the source's."""
    view, plan = made.view, made.plan
    write_text(folder / "config.json", config_json(view, made.blueprint))
    write_text(folder / PLAN_FILE, plan.to_json())
    if len(shards) > 1:
        write_text(folder / INDEX_FILE, index_json(shards))
    if not made.blueprint.ordinary:
        write_text(folder / EXPERTS_FILE, made.blueprint.contents.to_json())
    names = (made.terms.source_name, made.terms.name)
    facts = _facts(view, plan, made.blueprint, names, made.measured)
    write_text(folder / "README.md", model_card(facts))
    _check_opens(folder, ordinary=made.blueprint.ordinary)
