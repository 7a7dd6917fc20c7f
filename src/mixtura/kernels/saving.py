"""Models that cannot be saved from memory, because what is stored in them is not what others read."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from torch import nn

from mixtura.errors import UnsupportedModelError


def refuse_save(model: nn.Module, what: str) -> None:
    """Let ``save_pretrained`` of a model, and of models within it, raise `UnsupportedModelError`.

    Args:
        model: whatever holds modules; only models of transformers are changed, so that adapters around
            them can still be saved.
        what: what the model is, as the sentence is to call it.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            saved: Any = module
            saved.save_pretrained = partial(_refuse, what)


def _refuse(what: str, *_: Any, **__: Any) -> NoReturn:
    raise UnsupportedModelError(
        f"{what} cannot be saved from memory; copy the directory it was loaded from, or apply another plan "
        "to the original"
    )
