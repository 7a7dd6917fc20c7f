"""An ensemble that was trained, on disk: what it is and whose, its parts as safetensors, its own model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mixtura.errors import OutputError, UserError
from mixtura.methods import create, declared_tags
from mixtura.methods.ensembles import Ensemble
from mixtura.methods.settings import settings
from mixtura.running.ensembling.team import Team
from mixtura.running.ensembling.training import Stage
from mixtura.running.whole import load_any

_DESCRIPTION, _PARTS, _OWN = "ensemble.json", "ensemble.safetensors", "own"
_VERSION: Final = 1


def check_target(folder: Path) -> None:
    """Refuse a folder that has something in it, before the work begins.

    Raises:
        OutputError: it is there already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is there already; give another folder for the ensemble")


def save(folder: Path, ensemble: Ensemble, team: Team, stages: Sequence[Stage]) -> None:
    """Write what was trained to a folder that is not there yet, or is empty.

    Raises:
        OutputError: the folder has something in it, or cannot be written.
    """
    check_target(folder)
    described = {
        "version": _VERSION,
        "method": type(ensemble).__module__.rpartition(".")[2],
        "settings": {key: getattr(ensemble, key) for key in settings(type(ensemble))},
        "models": [{"name": name, "mark": mark} for name, mark in zip(team.names, team.marks, strict=True)],
        "stages": [asdict(one) for one in stages],
    }
    parts = {name: one.detach().cpu().contiguous() for name, one in ensemble.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(parts, folder / _PARTS)
        if team.own is not None:
            team.own.save_pretrained(folder / _OWN)
            team.tokenizer.save_pretrained(folder / _OWN)
        (folder / _DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}") from None


def open_ensemble(folder: Path, team: Team) -> tuple[Ensemble, Team]:
    """What `save` wrote, and the team with the method's own model.

    Raises:
        UserError: there is none, it is damaged, or it was trained for other models.
    """
    try:
        described = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        parts = load_file(folder / _PARTS)
    except OSError:
        raise UserError(f"there is no ensemble in {folder}; `mixtura ensemble train` makes one") from None
    except (ValueError, SafetensorError) as error:
        raise UserError(f"the ensemble in {folder} is damaged ({error}); train it again") from None
    if not isinstance(described, dict) or described.get("version") != _VERSION:
        raise UserError(f"the ensemble in {folder} is of another version; train it again")
    _check_models(folder, described["models"], team)
    ensemble: Ensemble = create("ensembles", described["method"], **described["settings"])
    if "own_model" in declared_tags(type(ensemble)):
        if not (folder / _OWN / "config.json").is_file():
            raise UserError(f"the ensemble in {folder} lacks its own model, {_OWN}; train it again")
        team = team.with_own(ensemble, load_any(folder / _OWN, dtype=torch.float32))
    ensemble.build(team.facts)
    try:
        ensemble.load_state_dict(parts)
    except RuntimeError:
        raise UserError(
            f"the ensemble in {folder} lacks parts or has others than {described['method']} has; train it "
            "again"
        ) from None
    ensemble.eval()
    return ensemble, team


def method_of(folder: Path) -> str | None:
    """The name of the method whose trained ensemble lies in a folder, None where there is none."""
    try:
        found = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        return str(found["method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_models(folder: Path, known: Sequence[dict[str, Any]], team: Team) -> None:
    names = ", ".join(one["name"] for one in known)
    if len(known) != len(team.models):
        raise UserError(
            f"the ensemble in {folder} is of {len(known)} models ({names}), {len(team.models)} are given; "
            "give these in the same order"
        )
    for one, name, mark in zip(known, team.names, team.marks, strict=True):
        if one["mark"] != mark:
            raise UserError(
                f"the ensemble in {folder} was trained with {one['name']} where {name} is given now; give "
                f"{names} in this order, or train it again"
            )
