"""Whether a decoder is still what it was when it was looked through, which every step asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, final

from torch import Tensor, nn
from transformers import PreTrainedConfig

from mixtura.kernels.compiled import native

# Of a module: what must keep all its entries, and the attributes that change what it does or who sees it.
_DICTS: Final = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_NAMES: Final = ("forward", "config", "mixtura_store", "mixtura_observer")


@final
class Unchanged:
    """All that an answer about a decoder may rest on, so that it is worked out again only where that changed.

    These are the classes, parts and hooks of the modules in the decoder, where their tensors lie, what
    decides how they run, their configurations, and the hooks of all modules.
    """

    def __init__(self, model: Any) -> None:
        inner = [*model.modules()][1:]
        shared = nn.modules.module
        self._config, self._modules = model.config, model._modules
        dicts = [self._modules, shared._global_forward_hooks, shared._global_forward_pre_hooks]
        configs = {id(one): one for one in _configs(model.config)}
        # Not the decoder itself nor its own attributes, which may refer to it: it is to be let go where
        # nobody else holds it.
        owners = [module.__dict__ for module in inner]
        for own in owners:
            dicts += [own[name] for name in _DICTS]
            configs |= {id(one): one for one in _configs(own.get("config"))}
        dicts += [vars(config) for config in configs.values()]
        extension = native()
        assert extension is not None
        self._tensors = [*model.parameters(), *model.buffers()]
        self._watch = extension.Watch(dicts, owners, _NAMES, [*inner, *self._tensors])
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]

    def holds_for(self, model: Any) -> bool:
        """Whether nothing changed."""
        return (
            model.config is self._config
            and model._modules is self._modules
            and self._watch.is_same()
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
        )


def _configs(config: Any) -> Iterator[PreTrainedConfig]:
    """A configuration and those in it, whose values it may show as its own."""
    if isinstance(config, PreTrainedConfig):
        yield config
        for value in vars(config).values():
            yield from _configs(value)
