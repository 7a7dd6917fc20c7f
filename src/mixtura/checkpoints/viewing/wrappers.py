"""Looking through what wraps a model or a part of it: adapters, compilation, checkpointing, sharding.

Views, rerouting and observing all find the plain model, and its parts by their plain names, here.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mixtura.errors import UnsupportedModelError, UserError

# How PEFT's adapters, torch.compile, PyTorch's checkpointing and its sharding call the module that they wrap.
ADAPTED = "base_layer"
_WRAPPED = (ADAPTED, "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def inner(module: nn.Module) -> nn.Module:
    """The module inside what wraps it."""
    while True:
        found = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
        if found is None:
            return module
        module = found


def own_of(module: nn.Module) -> nn.Module:
    """The module itself where PEFT keeps trained copies of it beside it (``modules_to_save``).

    What has copies gives, asked for an attribute of the module, that of the copy that is in use.
    """
    return module._modules.get("original_module") or module


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A module by its name in the plain model, also where something wraps what is on the way to it.

    Raises:
        AttributeError: there is none.
    """
    module = inner(model)
    for part in name.split(".") if name else []:
        module = inner(getattr(module, part))
    return module


def plain_name(name: str) -> str:
    """The name that a module or tensor has where nothing is wrapped.

    >>> plain_name("model.layers.0._orig_mod.mlp.experts.base_layer.down_proj")
    'model.layers.0.mlp.experts.down_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules under transformers' common experts contract, with their names in the plain model."""
    for name, module in model.named_modules():
        if "_is_expert_parallel" in vars(module) and "is_concatenated" in vars(module):
            yield plain_name(name), module


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model inside what wraps it: adapters, compilation, several processes, a trainer's.

    A module that holds none is given back as it is.

    Raises:
        UserError: it holds several models with experts.
        UnsupportedModelError: it is a part of a model, with experts but without what knows their config.
    """
    found = {id(one): (name, one) for name, one in _models(model, "")}
    if len(found) > 1:
        having = {key: value for key, value in found.items() if _has_experts(value[1])}
        found = having or found
    if not found:
        if _has_experts(model) and not hasattr(model, "config"):
            raise UnsupportedModelError(
                f"{type(model).__name__} is no model of transformers and wraps none; give the model itself"
            )
        return model
    if len(found) > 1:
        names = ", ".join(sorted(name for name, _ in found.values()))
        raise UserError(
            f"{type(model).__name__} holds {len(found)} models ({names}); give the one that is meant"
        )
    ((_, one),) = found.values()
    return one


def _models(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost models of transformers, with their names."""
    if isinstance(module, PreTrainedModel):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _models(child, f"{name}.{key}".lstrip("."))


def _has_experts(model: nn.Module) -> bool:
    return next(experts_modules(model), None) is not None


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether a parameter's values are brought here for its own module's forward only.

    So it is with what accelerate offloads and with what FSDP and DeepSpeed ZeRO-3 shard: between forwards
    a placeholder is left.
    """
    if isinstance(tensor, DTensor):
        return True
    gone = tensor.numel() == 0 or tensor.untyped_storage().size() == 0
    return tensor.is_meta or gone
