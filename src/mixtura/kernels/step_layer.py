"""Decoder layers that run few tokens in one or two compiled calls where that gives what their own code gives.

`quicken_layers` gives each decoder layer of the usual form a class that inherits from its own. On passes
of few tokens without gradients it runs the compiled calls, on everything else its own ``forward``. Each half
of a layer, attention and what follows it, is taken alone, after it was tried on random tokens against that
``forward``.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, Final, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mixtura.kernels.compiled import NUMBERS, is_plain, options
from mixtura.kernels.declined import Declined
from mixtura.kernels.step_calls import Around, Tables, num_keys
from mixtura.kernels.step_parts import LAYER_NAMES, others_in
from mixtura.kernels.step_trial import WATCHED, Found, find_parts
from mixtura.machine.releases import CACHE_NAMES, given_cache

# Tokens up to which a layer runs by the compiled calls.
_MOST_TOKENS: Final = 64
# Arguments of a layer that change nothing of what the compiled calls compute.
_IDLE: Final = {"position_ids", "use_cache", "cache_position"}
_NEEDED: Final = {"position_embeddings", "attention_mask", *CACHE_NAMES}
_OTHER_TOKENS: Final = (
    f"its tokens are more than {_MOST_TOKENS}, or not contiguous float32 or bfloat16 on the processor"
)


def quicken_layers(model: nn.Module) -> int:
    """Let a model's decoder layers of the usual form run few tokens by compiled calls; gives how many."""
    taken = 0
    for module in model.modules():
        if not isinstance(module, QuickLayer) and not why_unusual(module):
            module.__class__ = under(QuickLayer, type(module))
            taken += 1
    return taken


def why_unusual(layer: nn.Module) -> str:
    """Why a module is no decoder layer of the usual form; nothing where it is one."""
    if missing := ", ".join(sorted(LAYER_NAMES - layer._modules.keys())):
        return f"its layers have no {missing}"
    others = others_in(layer, LAYER_NAMES)
    return f"its layers also use {others}" if others else ""


# By the two classes that each was made of.
_made: dict[tuple[object, object], type[Any]] = {}


def under(quick: type[Any], own: type[Any]) -> type[Any]:
    """The class ``own`` with ``quick`` before it, under its own name; always the same one."""
    if (quick, own) in _made:
        return _made[quick, own]
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return _made.setdefault((quick, own), type(own.__name__, (quick, own), names))


def remade_from(self: nn.Module, protocol: Any) -> Any:
    """How a quickened module is copied and pickled: its class is made anew from those that it has."""
    reduced: Any = nn.Module.__reduce_ex__(self, protocol)
    _, (cls, *rest), *others = reduced
    quick, own = cls.__mro__[1:3]
    return _remade, (quick, own, *rest), *others


def _remade(quick: type[nn.Module], own: type[nn.Module], *args: Any) -> Any:
    cls = under(quick, own)
    return cls.__new__(cls, *args)


class QuickLayer(nn.Module, ABC):
    """What a decoder layer's class gets before its own: a ``forward`` that tries the compiled calls first."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own result."""
        if not args and not torch.is_grad_enabled() and not self.training:
            step = _steps.get(self)
            if step is None:
                step = _steps[self] = _Step()
            made = step.run(self, hidden_states, kwargs)
            if made is not None:
                return made
        return super().forward(hidden_states, *args, **kwargs)

    __reduce_ex__ = remade_from


def own_class(layer: nn.Module) -> type[nn.Module]:
    """A layer's class as transformers has it."""
    cls = type(layer)
    return cls.__mro__[2] if issubclass(cls, QuickLayer) else cls


def found_of(layer: nn.Module) -> Found | None:
    """What was found of a quickened layer and is still so; None before its first small pass."""
    step = _steps.get(layer)
    found = None if step is None else step.found
    return found if found is not None and found.is_intact(layer) else None


def why_not_now(layer: nn.Module) -> str:
    """Why the last pass through a quickened layer did not use what was found of it; nothing where it did."""
    step = _steps.get(layer)
    return "" if step is None else step.why


def state_of(layer: nn.Module) -> str:
    """Which halves of a quickened layer compiled calls run: ``AM`` for both, ``A-``, ``-M``, or ``--``."""
    step = _steps.get(layer)
    found = None if step is None else step.found
    if found is None:
        return "--"
    return ("-" if found.attention is None else "A") + ("-" if found.mixture is None else "M")


_steps: WeakKeyDictionary[nn.Module, _Step] = WeakKeyDictionary()


@final
class _Step:
    """What was found of a layer, and why the last pass did not use it."""

    def __init__(self) -> None:
        self.found: Found | None = None
        self.why = ""

    def run(self, layer: Any, x: Any, named: dict[str, Any]) -> Tensor | None:
        """The layer's result by compiled calls; None where it takes its own path; ``why`` says why."""
        try:
            made = self._run(layer, x, named)
        except Declined as reason:
            self.why = str(reason)
            return None
        self.why = ""
        return made

    def _run(self, layer: Any, x: Any, named: dict[str, Any]) -> Tensor | None:
        if options().mode != "fast":
            raise Declined(f"the kernels' mode is {options().mode!r}")
        if not _is_small(x):
            raise Declined(_OTHER_TOKENS)
        tables: Any = named.get("position_embeddings")
        mask, cached = named.get("attention_mask"), given_cache(named)
        attention = layer.self_attn
        if not _are_tables(tables, x):
            raise Declined("its layers are not given one table each of cosines and sines")
        if asked := _asked_besides(named):
            raise Declined(f"its layers are given {asked}")
        implementation = attention.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise Declined(f"its attention runs by the implementation {implementation!r}")
        around = Around(Tables(tables[0], tables[1]), mask, cached, getattr(attention, "layer_idx", 0))
        _check_keys(implementation, around, x)
        found = self.found
        if found is not None and found.is_watched():
            # What was found without somebody looking on holds again when they have gone.
            raise Declined(WATCHED)
        if found is None or not found.is_intact(layer):
            if not bool(around.tables.sines[:, -1].any()):
                # At the first place no rotation turns anything: they cannot be told apart.
                raise Declined("nothing but the first place of a text was seen of it")
            found = self.found = find_parts(layer, own_class(layer), x, around)
        if found.is_watched():
            raise Declined(WATCHED)
        return None if found.is_idle else found.run(layer, x, around, named)


def _is_small(x: Any) -> bool:
    return (
        type(x) is Tensor
        and x.ndim == 3
        and 0 < x.shape[0] * x.shape[1] <= _MOST_TOKENS
        and x.dtype in NUMBERS
        and x.is_contiguous()
        and is_plain(x)
        and not torch.is_autocast_enabled("cpu")
    )


def _are_tables(tables: Any, x: Tensor) -> bool:
    if not isinstance(tables, tuple) or len(tables) != 2:
        return False
    return all(
        type(t) is Tensor
        and t.ndim == 3
        and t.shape[0] in (1, x.shape[0])
        and t.shape[1] == x.shape[1]
        and t.dtype == x.dtype
        and t.stride() == tables[0].stride()
        and t.stride(2) == 1
        for t in tables
    )


def _check_keys(implementation: str, around: Around, x: Tensor) -> None:
    """Decline where the compiled attention would see other keys than the layer's own.

    Without a mask, several tokens see themselves there, and nothing before them.
    """
    mask, cached = around.mask, around.cache
    if cached is not None and not isinstance(cached, Cache):
        raise Declined(f"its cache is a {type(cached).__name__}")
    if mask is not None:
        if not _is_mask(mask, x) or mask.shape[3] != num_keys(cached, around.layer_index, x.shape[1]):
            raise Declined("its attention's mask is none of a number for each token and key")
    elif x.shape[1] > 1:
        if implementation != "sdpa":
            raise Declined(f"several tokens without a mask see each other in {implementation!r} attention")
        if cached is not None and cached.get_seq_length(around.layer_index) != 0:
            raise Declined("several tokens without a mask see only themselves, not the cache before them")


def _is_mask(mask: Any, x: Tensor) -> bool:
    if type(mask) is not Tensor or mask.ndim != 4 or mask.device.type != "cpu":
        return False
    fits = mask.shape[0] in (1, x.shape[0]) and mask.shape[1] == 1 and mask.shape[2] == x.shape[1]
    return fits and (mask.dtype == torch.bool or mask.dtype in NUMBERS)


def _asked_besides(named: dict[str, Any]) -> str:
    return ", ".join(
        name
        for name, value in named.items()
        if value is not None and value is not False and name not in _IDLE and name not in _NEEDED
    )
