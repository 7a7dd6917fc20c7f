"""All decoder layers of a model in one compiled call, for one new token of each sequence.

A layer alone, called by its model, costs little in itself. But between two layers' weights, which drive
everything else out of the caches, every line of Python costs several times what it would cost alone. So where
a model does no more than usual around its layers, a step prepares them all first and then runs them together.
"""

from __future__ import annotations

import inspect
from abc import ABC
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from mixtura.kernels.compiled import NUMBERS, is_plain, is_recorded, is_wrapped, native, options, way_for
from mixtura.kernels.step_cache import can_grow, grow
from mixtura.kernels.step_calls import Tables, grown_place, mask_of, turns_of
from mixtura.kernels.step_layer import QuickLayer, found_of, remade_from, under
from mixtura.kernels.step_parts import Part, norm_part
from mixtura.kernels.step_trial import Found
from mixtura.kernels.step_watch import Unchanged

_NAMES: Final = {
    "BaseModelOutputWithPast", "DynamicCache", "MoeModelOutputWithPast", "ValueError", "arange", "config",
    "create_causal_mask", "create_sliding_window_causal_mask", "device", "dict", "embed_tokens", "enumerate",
    "get_seq_length", "isinstance", "layer_types", "layers", "norm", "num_hidden_layers", "rotary_emb", "set",
    "shape", "sliding_window", "torch", "unsqueeze",
}  # fmt: skip
_PARTS: Final = ("embed_tokens", "layers", "norm", "rotary_emb")
_ASKED: Final = ("output_attentions", "output_hidden_states", "output_router_logits")
_USUAL: Final = {"attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"}
_RESULTS: Final = {"last_hidden_state", "past_key_values"}
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


class _Layer(NamedTuple):
    """The extension's records of a layer's halves, and the sizes of its keys and values."""

    attention: Any
    mixture: Any
    num_kv_heads: int
    width: int


@final
@dataclass(frozen=True, slots=True)
class _Checked:
    """A decoder all of whose layers can run together, as long as nothing of it changes.

    Attributes:
        unchanged: whether this still holds.
        founds: what was found of its layers, whose records must stay.
        layers: what a step takes of it.
        embedding: the table of embeddings, where they are looked up in one and no more.
        dtype: of tokens between layers.
        rotary: makes tables of cosines and sines.
        window: tokens that a layer sees whose kind is not ``full_attention``; None for all.
        kinds: of the layers, where the configuration says.
    """

    unchanged: Unchanged
    founds: list[Found]
    layers: list[_Layer]
    embedding: Tensor | None
    dtype: torch.dtype
    rotary: Any
    window: int | None
    kinds: Any

    def windows_fit(self, cached: DynamicCache, length: int) -> bool:
        """Whether no mask is needed: a layer that sees a window holds no more than it."""
        if self.window is None or length <= self.window:
            return True
        for index, layer in enumerate(cached.layers):
            kinds = self.kinds
            is_full = kinds is not None and index < len(kinds) and kinds[index] == "full_attention"
            if type(layer) is not DynamicSlidingWindowLayer and not is_full:
                return False
        return True


@final
@dataclass(frozen=True, slots=True)
class _Output:
    """A class of results, made without its constructor, whose checks take longer than preparing a layer.

    Attributes:
        kind: of transformers' results, dicts in order whose entries are their attributes too.
        fields: all of them, None each.
    """

    kind: type[Any]
    fields: dict[str, None]

    def of(self, hidden: Tensor, cached: DynamicCache) -> Any:
        """What ``kind`` makes of a hidden state and a cache."""
        made: Any = OrderedDict.__new__(self.kind)
        given = {"last_hidden_state": hidden, "past_key_values": cached}
        vars(made).update(self.fields, **given)
        for name, value in given.items():
            OrderedDict.__setitem__(made, name, value)
        return made


@final
class Stack:
    """What was found of a decoder."""

    def __init__(self) -> None:
        self._checked: _Checked | None = None
        self._norm: Part | None = None
        self._output: _Output | None = None
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
        if not _is_step(ids) or type(cached) is not DynamicCache or _asks_more(named):
            return None
        past = cached.get_seq_length()
        if not past or not _all_seen(named.get("attention_mask"), named.get("position_ids"), ids, past):
            return None
        checked = self._checked
        if checked is None or not checked.unchanged.holds_for(model):
            checked = self._checked = self._check(model)
        if checked is None or self._declined or not checked.windows_fit(cached, past + 1):
            return None
        if self._output is None and not self._try(model, checked):
            self._declined = True
            return None
        hidden = self._step(model, ids, checked, cached, past)
        assert self._output is not None
        return None if hidden is None else self._output.of(hidden, cached)

    def _check(self, model: Any) -> _Checked | None:
        """Look through a decoder; None where its layers cannot run together."""
        config, embed = model.config, model.embed_tokens
        if not _is_usual(config) or _are_watched(model):
            return None
        founds = [found for layer in model.layers if (found := found_of(layer)) and found.is_whole()]
        if len(founds) != len(model.layers):
            return None
        watched = tuple(
            (t, t.data_ptr()) for t in (embed.weight, model.norm.weight, model.rotary_emb.inv_freq)
        )
        if [(id(t), at) for t, at in watched] != [(id(t), at) for t, at in self._watched]:
            self._watched, self._declined, self._output, self._tables = watched, False, None, {}
        window = getattr(config, "sliding_window", None)
        return _Checked(
            Unchanged(model),
            founds,
            [_Layer(f.attention, f.mixture, f.shape.num_kv_heads, f.shape.width) for f in founds],
            _plain_table(embed),
            model.norm.weight.dtype,
            model.rotary_emb,
            window if isinstance(window, int) else None,
            getattr(config, "layer_types", None),
        )

    def _try(self, model: Any, checked: _Checked) -> bool:
        """Whether three tokens and one more come out as from the model itself."""
        own: Any = type(model).__mro__[2]
        self._norm = norm_part(model.norm, checked.dtype)
        if self._norm is None:
            return False
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.embed_tokens.num_embeddings, (1, 4), generator=generator)
        theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for filled in (theirs, ours):
            own.forward(model, tokens[:, :3], past_key_values=filled, use_cache=True)
        expected = own.forward(model, tokens[:, 3:], past_key_values=theirs, use_cache=True)
        found = self._step(model, tokens[:, 3:], checked, ours, 3)
        if found is None or not isinstance(getattr(expected, "last_hidden_state", None), Tensor):
            return False
        wanted = expected.last_hidden_state
        tolerance = 1e-5 if wanted.dtype == torch.float32 else 2e-2
        close = float((found - wanted).float().norm()) <= tolerance * float(wanted.float().norm())
        if close and isinstance(expected, OrderedDict) and set(expected) == _RESULTS:
            self._output = _Output(type(expected), dict.fromkeys(vars(expected)))
        return self._output is not None

    def _step(self, model: Any, ids: Tensor, checked: _Checked, cached: Any, past: int) -> Tensor | None:
        extension = native()
        assert extension is not None
        assert self._norm is not None
        dtype = checked.dtype
        x = _embedded(model, checked.embedding, ids)
        if type(x) is not Tensor or not is_plain(x) or x.dtype != dtype or not x.is_contiguous():
            return None
        tables, place = self._tables_at(checked.rotary, x, past)
        if tables is None or cached.offloading or len(cached.layers) < len(checked.layers):
            return None
        pairs = [*zip(checked.layers, cached.layers, strict=False)]
        # All of them before any grows: what declines leaves the cache as it was.
        for one, layer in pairs:
            if not can_grow(layer, x.shape[0], one.num_kv_heads, one.width, dtype):
                return None
        turns, mask = turns_of(tables, place), mask_of(None)
        steps = [
            (one.attention, one.mixture, grown_place(turns, grow(layer, 1), mask)) for one, layer in pairs
        ]
        # Nobody else has these tokens: what comes out of each layer may take their place.
        tokens = extension.Pass(way_for(dtype), NUMBERS[dtype], *x.shape, x.data_ptr(), x.data_ptr())
        extension.run_layers(tokens, steps, self._norm.record)
        return x

    def _tables_at(self, rotary: Any, x: Tensor, past: int) -> tuple[Tables | None, int]:
        """Cosines and sines of a place, or of a block where they depend on it alone; and its row in them."""
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
                or made[0].dtype != x.dtype
            ):
                return None, 0
            tables = Tables(*made)
            self._tables = {first: tables}
        return tables, past - first


def runs_together(model: nn.Module) -> bool:
    """Whether a quickened decoder was found to run its layers in one call."""
    stack = _stacks.get(model)
    return stack is not None and stack.is_tried


_stacks: WeakKeyDictionary[nn.Module, Stack] = WeakKeyDictionary()


def _is_step(ids: Any) -> bool:
    return type(ids) is Tensor and ids.ndim == 2 and ids.shape[1] == 1 and 0 < ids.shape[0] <= _MOST_SEQUENCES


def _asks_more(named: dict[str, Any]) -> bool:
    """Whether a call wants anything but the next hidden states, or none of the cache."""
    if any(value is not None and value is not False and name not in _USUAL for name, value in named.items()):
        return True
    return named.get("use_cache") is False or torch.is_autocast_enabled("cpu")


def _is_usual(config: Any) -> bool:
    """Whether a configuration wants nothing but hidden states, by attention that is known."""
    known = config._attn_implementation in ("sdpa", "eager")
    return known and not any(getattr(config, name, False) for name in _ASKED)


def _plain_table(embed: Any) -> Tensor | None:
    """The table in which a module looks up rows and does no more."""
    if type(embed) is not nn.Embedding or embed.max_norm is not None:
        return None
    return embed.weight if is_plain(embed.weight) and embed.weight.is_contiguous() else None


def _embedded(model: Any, table: Tensor | None, ids: Tensor) -> Any:
    """What ``embed_tokens`` gives, in memory of its own."""
    extension = native()
    assert extension is not None
    # The module and PyTorch's operators take many times as long as the copy.
    if table is not None and _is_index(ids):
        num_rows, width = table.shape
        x = table.new_empty(*ids.shape, width)
        row_bytes = width * table.element_size()
        if extension.look_up(
            table.data_ptr(), row_bytes, num_rows, ids.data_ptr(), ids.numel(), x.data_ptr()
        ):
            return x
    made = model.embed_tokens(ids)
    return made.clone() if isinstance(made, Tensor) else None


def _is_index(ids: Tensor) -> bool:
    return (
        ids.dtype == torch.int64
        and ids.is_cpu
        and ids.is_contiguous()
        and not is_recorded()
        and not is_wrapped(ids)
    )


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
