"""Whether a part of a model is still what it was when it was looked through, which every pass asks.

An answer that is kept must rest on nothing that can change unseen. So everything is watched that the compiled
calls were given a copy of or that was decided from: not a list of names, but all attributes of all modules,
their tensors' places, their configurations, the code that they run and the names it finds in its module, and
the values of those few tensors whose numbers were copied. Whatever changed, the answer is worked out anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixtura.kernels.compiled import native

_PARTS: Final = ("_modules", "_parameters", "_buffers")
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")
# The attention that is no function of a family's own module.
_ATTENTION: Final = "sdpa"


@final
class Unchanged:
    """All that an answer about a module of a model may rest on.

    The module itself and its own attributes are not held, as they may refer to it: it is to be let go where
    nobody else holds it.

    Args:
        root: a decoder or one of its layers.
        hooks: whether its modules' hooks, and the hooks of all modules, belong to it.
        copied: tensors whose numbers were copied, so that writing into them is a change.
    """

    def __init__(self, root: nn.Module, *, hooks: bool, copied: Iterable[Tensor] = ()) -> None:
        inner = [*root.modules()][1:]
        names = _PARTS + _HOOKS if hooks else _PARTS
        shared = nn.modules.module
        self._config, self._modules = root.__dict__.get("config"), root._modules
        dicts: list[dict[Any, Any]] = [shared._global_forward_hooks, shared._global_forward_pre_hooks]
        dicts = dicts if hooks else []
        dicts += [root.__dict__[name] for name in _PARTS]
        configs = {id(one): one for one in _configs(self._config)}
        for module in inner:
            own = module.__dict__
            dicts += [own, *(own[name] for name in names)]
            configs |= {id(one): one for one in _configs(own.get("config"))}
        dicts += [vars(config) for config in configs.values()]
        extension = native()
        assert extension is not None
        self._tensors = [*root.parameters(), *root.buffers()]
        self._watch = extension.Watch(dicts, [], (), [*inner, *self._tensors])
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        self._copied = [(tensor, tensor.clone()) for tensor in copied]
        classes: dict[Any, None] = dict.fromkeys([type(root), *map(type, inner)])
        self._forwards = [(cls, cls.forward) for cls in classes]
        self._code = [*_code_of(classes)]
        self._attention = ALL_ATTENTION_FUNCTIONS.get(_ATTENTION)

    def holds_for(self, root: nn.Module) -> bool:
        """Whether nothing changed."""
        return (
            root.__dict__.get("config") is self._config
            and root._modules is self._modules
            and self._watch.is_same()
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
            and all(cls.forward is forward for cls, forward in self._forwards)
            and all(space.get(name) is value for space, name, value in self._code)
            and ALL_ATTENTION_FUNCTIONS.get(_ATTENTION) is self._attention
            and all(torch.equal(tensor, was) for tensor, was in self._copied)
        )


def _configs(config: Any) -> Iterator[PreTrainedConfig]:
    """A configuration and those in it, whose values it may show as its own."""
    if isinstance(config, PreTrainedConfig):
        yield config
        for value in vars(config).values():
            yield from _configs(value)


def _code_of(classes: Iterable[type]) -> Iterator[tuple[Mapping[str, Any], str, object]]:
    """What families' classes define, and what their functions find in the modules they were written in.

    As triples: where a name is looked up, the name, and what it means. PyTorch's own code is taken as given.
    """
    bases = dict.fromkeys(base for cls in classes for base in cls.__mro__ if "forward" in vars(base))
    seen: set[tuple[int, str]] = set()
    for base in bases:
        if base.__module__.partition(".")[0] == "torch":
            continue
        for name, value in vars(base).items():
            if name.startswith("__"):
                continue
            yield vars(base), name, value
            function = inspect.unwrap(value) if isinstance(value, FunctionType) else value
            if not isinstance(function, FunctionType):
                continue
            space = function.__globals__
            for used in function.__code__.co_names:
                found = space.get(used)
                if used in space and not isinstance(found, ModuleType) and (id(space), used) not in seen:
                    seen.add((id(space), used))
                    yield space, used, found
