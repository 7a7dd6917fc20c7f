"""Models without weights: a config's class, and that class built on the meta device in milliseconds."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import transformers
from torch import nn
from transformers import initialization
from transformers.models.auto import modeling_auto

from mixtura.errors import CheckpointError, UnsupportedModelError


def model_class(config: Any) -> type[nn.Module]:
    """The transformers class of a config: the one it names, else its causal LM, else its base model.

    Raises `UnsupportedModelError` where transformers has no class for it.
    """
    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        # A config read for a part of a model may still name the whole model's class.
        if named is not None and getattr(named, "config_class", None) in (None, type(config)):
            return _as_module_class(named)
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        modeling_auto.MODEL_MAPPING,
    ):
        if type(config) in mapping:
            return _as_module_class(mapping[type(config)])
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} has no model class for the model type "
        f"{config.model_type!r}; use a model that it can build without remote code"
    )


def _as_module_class(cls: Any) -> type[nn.Module]:
    assert isinstance(cls, type)
    assert issubclass(cls, nn.Module)
    return cls


def build_meta(cls: type[nn.Module], config: Any) -> nn.Module:
    """A model of class ``cls`` whose tensors have shapes but no storage."""
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        stack.enter_context(initialization.no_init_weights())
        return cls(config)


def build_from_config(config: Any) -> nn.Module:
    """The model a config describes, on the meta device.

    Raises `UnsupportedModelError` for a family without a class, `CheckpointError` for a config that
    the class cannot be built from.
    """
    cls = model_class(config)
    try:
        return build_meta(cls, config)
    except Exception as error:
        # A class raises whatever it likes on values that do not fit together; the file is at fault.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(
            f"{cls.__name__} cannot be built from this config.json ({reason}); correct it, or use the "
            f"transformers that it was written for (here is {transformers.__version__})"
        ) from None


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors
