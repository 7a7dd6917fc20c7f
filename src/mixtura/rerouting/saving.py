"""Saving a model whose routing was changed: the ordinary checkpoint, and what is beyond it in side files."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mixtura.rerouting.core import Rerouting
from mixtura.rerouting.seats import BALANCE, ROUTER


def begin_saving(rerouting: Rerouting) -> None:
    """Let the model's ``save_pretrained`` leave out what is not the family's own and write it beside."""
    model: Any = rerouting.model
    if "save_pretrained" not in vars(model):
        model.save_pretrained = partial(_save, model, rerouting)
        rerouting.undone.append(partial(_stop_saving, model))


def _stop_saving(model: Any) -> None:
    with suppress(AttributeError):
        del model.save_pretrained


def _save(model: Any, rerouting: Rerouting, directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """`PreTrainedModel.save_pretrained`, and the side files."""
    extra = {
        f"{name}.{child}.{key}"
        for name, module in model.named_modules()
        for child in (ROUTER, BALANCE)
        if hasattr(module, child)
        for key in getattr(module, child).state_dict()
    }
    before = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = set(before or ()) | extra
    try:
        result = type(model).save_pretrained(model, directory, *args, **kwargs)
    finally:
        model._keys_to_ignore_on_save = before
    if kwargs.get("is_main_process", True):
        rerouting.save(directory)
    return result
