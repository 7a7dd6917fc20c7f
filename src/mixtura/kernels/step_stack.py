"""All decoder layers of a model in one compiled call, for one new token of each sequence.

A layer alone, called by its model, costs little in itself. But between two layers' weights, which drive
everything else out of the caches, every line of Python costs several times what it would cost alone. So where
a model does no more than usual around its layers, a step prepares them all first and then runs them together.
"""

from __future__ import annotations

import inspect
from abc import ABC
from typing import Any, Final, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from mixtura.kernels.compiled import NUMBERS, is_plain, native, options, way_for
from mixtura.kernels.step_cache import grow, growing_layer
from mixtura.kernels.step_calls import Around, Tables, place_of
from mixtura.kernels.step_layer import QuickLayer, found_of, remade_from, under
from mixtura.kernels.step_parts import Part, norm_part

_NAMES: Final = {
    "BaseModelOutputWithPast", "DynamicCache", "MoeModelOutputWithPast", "ValueError", "arange", "config",
    "create_causal_mask", "create_sliding_window_causal_mask", "device", "dict", "embed_tokens", "enumerate",
    "get_seq_length", "isinstance", "layer_types", "layers", "norm", "num_hidden_layers", "rotary_emb", "set",
    "shape", "sliding_window", "torch", "unsqueeze",
}  # fmt: skip
_PARTS: Final = ("embed_tokens", "layers", "norm", "rotary_emb")
_ASKED: Final = ("output_attentions", "output_hidden_states", "output_router_logits")
_MOST_SEQUENCES: Final = 64
# Rotations whose tables depend on nothing but the place, and the places that one block of tables has.
_FIXED_ROTATIONS: Final = {"default", "linear", "llama3", "yarn"}
_BLOCK: Final = 256


def quicken_stacks(model: nn.Module) -> None:
    """Let the parts of a model that hold decoder layers run them together where they can."""
    for module in model.modules():
        if not isinstance(module, QuickStack) and _has_usual_form(module):
            module.__class__ = under(QuickStack, type(module))


def _has_usual_form(module: nn.Module) -> bool:
    if not all(name in module._modules for name in _PARTS):
        return False
    layers = module._modules["layers"]
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or code is None:
        return False
    return all(isinstance(layer, QuickLayer) for layer in layers) and set(code.co_names) <= _NAMES


class QuickStack(nn.Module, ABC):
    """What the class of a decoder gets before its own: a ``forward`` that tries one compiled call first."""

    def forward(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The decoder's own result."""
        if not args and not torch.is_grad_enabled() and not self.training and options().mode == "fast":
            stack = _stacks.get(self)
            if stack is None:
                stack = _stacks[self] = Stack()
            made = stack.run(self, input_ids, kwargs)
            if made is not None:
                return made
        return super().forward(input_ids, *args, **kwargs)

    __reduce_ex__ = remade_from


@final
class Stack:
    """What was found of a decoder."""

    def __init__(self) -> None:
        self._norm: Part | None = None
        self._output: type[Any] | None = None
        self._declined = False
        self._watched: tuple[tuple[object, int], ...] = ()
        self._tables: dict[int, Tables] = {}

    @property
    def is_tried(self) -> bool:
        """Whether a step of it came out as from the model itself."""
        return self._output is not None

    def run(self, model: Any, ids: Any, named: dict[str, Any]) -> Any:
        """The decoder's result for one new token of each sequence; None where it must compute it itself."""
        cached: Any = named.get("past_key_values")
        if not _is_step(ids) or type(cached) is not DynamicCache or not _asks_usual(model, named):
            return None
        past = cached.get_seq_length()
        if not past or not _all_seen(named.get("attention_mask"), named.get("position_ids"), ids, past):
            return None
        founds = [found_of(layer) for layer in model.layers]
        if any(found is None or not found.is_whole() for found in founds):
            return None
        watched = tuple(
            (t, t.data_ptr())
            for t in (model.embed_tokens.weight, model.norm.weight, model.rotary_emb.inv_freq)
        )
        if [(id(t), at) for t, at in watched] != [(id(t), at) for t, at in self._watched]:
            self._watched, self._declined, self._output, self._tables = watched, False, None, {}
        if self._declined or _are_watched(model) or not _windows_fit(model, cached, past + 1):
            return None
        if self._output is None and not self._try(model, ids, founds):
            self._declined = True
            return None
        hidden = self._step(model, ids, founds, cached, past)
        if hidden is None:
            return None
        assert self._output is not None
        return self._output(last_hidden_state=hidden, past_key_values=cached)

    def _try(self, model: Any, ids: Tensor, founds: list[Any]) -> bool:
        """Whether three tokens and one more come out as from the model itself."""
        own: Any = type(model).__mro__[2]
        self._norm = norm_part(model.norm, model.norm.weight.dtype)
        if self._norm is None:
            return False
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.embed_tokens.num_embeddings, (1, 4), generator=generator)
        theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for filled in (theirs, ours):
            own.forward(model, tokens[:, :3], past_key_values=filled, use_cache=True)
        expected = own.forward(model, tokens[:, 3:], past_key_values=theirs, use_cache=True)
        found = self._step(model, tokens[:, 3:], founds, ours, 3)
        if found is None or not isinstance(getattr(expected, "last_hidden_state", None), Tensor):
            return False
        wanted = expected.last_hidden_state
        tolerance = 1e-5 if wanted.dtype == torch.float32 else 2e-2
        close = float((found - wanted).float().norm()) <= tolerance * float(wanted.float().norm())
        if close:
            self._output = type(expected)
        return close

    def _step(self, model: Any, ids: Tensor, founds: list[Any], cached: Any, past: int) -> Tensor | None:
        extension = native()
        assert extension is not None
        assert self._norm is not None
        x = model.embed_tokens(ids)
        if (
            type(x) is not Tensor
            or not is_plain(x)
            or x.dtype != model.norm.weight.dtype
            or not x.is_contiguous()
        ):
            return None
        tables = self._tables_at(model.rotary_emb, x, past)
        if tables is None or tables.cosines.dtype != x.dtype:
            return None
        layers = []
        for index, found in enumerate(founds):
            shape = found.shape
            layer = growing_layer(cached, index, x, shape.num_kv_heads, shape.width)
            if layer is None:
                return None
            layers.append(layer)
        steps = []
        for index, (found, layer) in enumerate(zip(founds, layers, strict=True)):
            keys, values = grow(layer, 1)
            place = place_of(Around(tables, None, cached, index), keys, values, 1)
            steps.append((found.attention, found.mixture, place))
        way = way_for(x.dtype)
        out = torch.empty_like(x)
        one = extension.Pass(way, NUMBERS[x.dtype], *x.shape, x.data_ptr(), out.data_ptr())
        extension.run_layers(one, steps, self._norm.record)
        return out

    def _tables_at(self, rotary: Any, x: Tensor, past: int) -> Tables | None:
        """Cosines and sines of one place, from a block of them where they depend on the place alone."""
        fixed = getattr(rotary, "rope_type", None) in _FIXED_ROTATIONS
        first = past // _BLOCK * _BLOCK if fixed else past
        tables = self._tables.get(first) if fixed else None
        if tables is None:
            places = torch.arange(first, first + (_BLOCK if fixed else 1))[None]
            made = rotary(x, places)
            if (
                not isinstance(made, tuple)
                or len(made) != 2
                or made[0].ndim != 3
                or made[0].stride() != made[1].stride()
            ):
                return None
            tables = Tables(*made)
            self._tables = {first: tables}
        return Tables(*(table[:, past - first : past - first + 1] for table in tables))


def runs_together(model: nn.Module) -> bool:
    """Whether a quickened decoder was found to run its layers in one call."""
    stack = _stacks.get(model)
    return stack is not None and stack.is_tried


_stacks: WeakKeyDictionary[nn.Module, Stack] = WeakKeyDictionary()


def _is_step(ids: Any) -> bool:
    return type(ids) is Tensor and ids.ndim == 2 and ids.shape[1] == 1 and 0 < ids.shape[0] <= _MOST_SEQUENCES


def _asks_usual(model: Any, named: dict[str, Any]) -> bool:
    usual = {"attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"}
    if any(value is not None and value is not False and name not in usual for name, value in named.items()):
        return False
    config = model.config
    if named.get("use_cache") is False or config._attn_implementation not in ("sdpa", "eager"):
        return False
    return not any(_own_flag(config, name) for name in _ASKED) and not torch.is_autocast_enabled("cpu")


def _own_flag(config: Any, name: str) -> bool:
    return bool(getattr(config, name, False))


def _all_seen(mask: Any, places: Any, ids: Tensor, past: int) -> bool:
    """Whether each sequence sees all of itself, and the new token stands right behind."""
    if mask is not None:
        fits = type(mask) is Tensor and mask.shape == (ids.shape[0], past + 1)
        if not fits or not bool(mask.all()):
            return False
    return places is None or (type(places) is Tensor and places.ndim == 2 and bool((places == past).all()))


def _are_watched(model: Any) -> bool:
    for name in ("embed_tokens", "norm", "rotary_emb"):
        module = model._modules[name]
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return True
    return bool(model.layers._forward_hooks)


def _windows_fit(model: Any, cached: DynamicCache, length: int) -> bool:
    """Whether no mask is needed: a layer that sees a window holds no more than it."""
    window = getattr(model.config, "sliding_window", None)
    if not isinstance(window, int) or length <= window:
        return True
    kinds = getattr(model.config, "layer_types", None)
    for index, layer in enumerate(cached.layers):
        is_full = kinds is not None and index < len(kinds) and kinds[index] == "full_attention"
        if type(layer) is not DynamicSlidingWindowLayer and not is_full:
            return False
    return True
