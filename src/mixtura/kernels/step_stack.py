"""All decoder layers of a model in one compiled call, for one new token of each sequence.

A layer alone, called by its model, costs little in itself. But between two layers' weights, which drive
everything else out of the caches, every line of Python costs several times what it would cost alone. So where
a model does no more than usual around its layers, a step prepares them all first and then runs them together.
"""

from __future__ import annotations

from abc import ABC
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from mixtura.kernels.compiled import NUMBERS, is_plain, native, options, way_for
from mixtura.kernels.declined import Declined
from mixtura.kernels.several import SideBySide
from mixtura.kernels.step_cache import can_grow
from mixtura.kernels.step_embedding import embedded, plain_table
from mixtura.kernels.step_layer import QuickLayer, found_of, remade_from, under
from mixtura.kernels.step_parts import Part, norm_part, others_in
from mixtura.kernels.step_passes import asked_besides, check_usual, is_step, stand_behind
from mixtura.kernels.step_rows import place_of, texts_of
from mixtura.kernels.step_steering import SteeredStep, UnsteeredError, current_steering
from mixtura.kernels.step_trial import WATCHED, Found
from mixtura.kernels.step_turning import Turning
from mixtura.kernels.step_watch import Unchanged
from mixtura.machine.releases import CACHE, given_cache, with_cache

_NAMES: Final = {
    "BaseModelOutputWithPast", "DynamicCache", "MoeModelOutputWithPast", "ValueError", "arange", "config",
    "create_causal_mask", "create_sliding_window_causal_mask", "device", "dict", "embed_tokens", "enumerate",
    "get_seq_length", "isinstance", "layer_types", "layers", "norm", "num_hidden_layers", "rotary_emb", "set",
    "shape", "sliding_window", "torch", "unsqueeze",
}  # fmt: skip
_PARTS: Final = ("embed_tokens", "layers", "norm", "rotary_emb")
_RESULTS: Final = {"last_hidden_state", CACHE}
UNTRIED: Final = "no text of it was continued yet"


def quicken_stacks(model: nn.Module) -> None:
    """Let the parts of a model that hold decoder layers run them together where they can."""
    for module in model.modules():
        if not isinstance(module, QuickStack) and not why_unusual_stack(module):
            module.__class__ = under(QuickStack, type(module))


def why_unusual_stack(module: nn.Module) -> str:
    """Why a module is no decoder of the usual form; nothing where it is one."""
    if missing := [name for name in _PARTS if name not in module._modules]:
        return f"its decoder has no {', '.join(missing)}"
    layers = module._modules["layers"]
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return "its decoder has no list of layers"
    if not all(isinstance(layer, QuickLayer) for layer in layers):
        return "not all layers of its decoder are of the usual form"
    others = others_in(module, _NAMES)
    return f"its decoder also uses {others}" if others else ""


class QuickStack(nn.Module, ABC):
    """What the class of a decoder gets before its own: a ``forward`` that tries one compiled call first."""

    def forward(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The decoder's own result."""
        steered, why = current_steering(), "it is no pass that compiled calls run"
        if not args and not torch.is_grad_enabled() and not self.training and options().mode == "fast":
            stack = _stacks.get(self)
            if stack is None:
                stack = _stacks[self] = Stack()
            made = stack.run(self, input_ids, kwargs, steered)
            if made is not None:
                if steered is not None:
                    steered.num_heeded += 1
                return made
            why = stack.why
        if steered is not None:
            raise UnsteeredError(why)
        return super().forward(input_ids, *args, **kwargs)

    __reduce_ex__ = remade_from


class _Layer(NamedTuple):
    """The extension's records of a layer's halves, the sizes of its keys and values, and its kind.

    Kinds have tables of cosines and sines of their own; it is None where all layers share them.
    """

    attention: Any
    mixture: Any
    num_kv_heads: int
    width: int
    kind: str | None


@final
@dataclass(frozen=True, slots=True)
class _Checked:
    """A decoder all of whose layers can run together, as a step takes it.

    Attributes:
        founds: what was found of its layers, whose records must stay.
        layers: what a step takes of it.
        embedding: the table of embeddings, where they are looked up in one and no more.
        norm: the last norm.
        dtype: of tokens between layers.
        turning: makes tables of cosines and sines.
        window: tokens that a layer sees whose kind is not ``full_attention``; None for all.
        kinds: of the layers, where the configuration says.
    """

    founds: list[Found]
    layers: list[_Layer]
    embedding: Tensor | None
    norm: Part
    dtype: torch.dtype
    turning: Turning
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

    def of(self, hidden: Tensor, cached: DynamicCache | SideBySide) -> Any:
        """What ``kind`` makes of a hidden state and a cache."""
        made: Any = OrderedDict.__new__(self.kind)
        given = {"last_hidden_state": hidden, **with_cache(cached)}
        vars(made).update(self.fields, **given)
        for name, value in given.items():
            OrderedDict.__setitem__(made, name, value)
        return made


@final
@dataclass(frozen=True, slots=True)
class _Looked:
    """What came of looking through a decoder.

    Attributes:
        unchanged: whether it still is what was looked through.
        refused: why its layers cannot run together; nothing where they can.
        checked: what a step takes of it, where they can.
        output: what its results are made of, where they can.
    """

    unchanged: Unchanged
    refused: str = ""
    checked: _Checked | None = None
    output: _Output | None = None


@final
class Stack:
    """What was found of a decoder, and why its last step was not one call; nothing where it was."""

    def __init__(self) -> None:
        self.why = UNTRIED
        self._looked: _Looked | None = None

    @property
    def is_tried(self) -> bool:
        """Whether a step of it came out as from the model itself."""
        return self._looked is not None and not self._looked.refused

    def run(self, model: Any, ids: Any, named: dict[str, Any], steered: SteeredStep | None = None) -> Any:
        """The decoder's result for one new token of each sequence; None where it must compute it itself."""
        if not is_step(ids):
            self.why = "its decoder is given no token ids" if ids is None else self.why
            return None
        try:
            made = self._run(model, ids, named, steered)
        except Declined as reason:
            self.why = str(reason)
            return None
        self.why = ""
        return made

    def _run(self, model: Any, ids: Tensor, named: dict[str, Any], steered: SteeredStep | None) -> Any:
        cached = given_cache(named)
        if type(cached) not in (DynamicCache, SideBySide):
            raise Declined(f"its cache is a {type(cached).__name__}")
        if asked := asked_besides(named):
            raise Declined(f"its decoder is asked for {asked}")
        if not stand_behind(cached, named.get("attention_mask"), named.get("position_ids"), ids):
            raise Declined("a sequence begins, is padded, or stands elsewhere than right behind its cache")
        looked = self._looked
        if looked is None or not looked.unchanged.holds_for(model):
            looked = self._looked = self._look(model)
        if looked.refused:
            raise Declined(looked.refused)
        checked, output = looked.checked, looked.output
        assert checked is not None
        assert output is not None
        for one in texts_of(cached):
            if not checked.windows_fit(one, one.get_seq_length() + 1):
                raise Declined("its cache holds more than the window that its layers see")
        records = {} if steered is None else steered.records
        if steered is not None and steered.num_tokens != ids.shape[0]:
            raise Declined("its steering is of another number of tokens")
        return output.of(_step(model, ids, checked, cached, records), cached)

    def _look(self, model: Any) -> _Looked:
        """Look through a decoder and try it; a refusal is kept until something changes."""
        founds = [found for layer in model.layers if (found := found_of(layer)) is not None]
        if len(founds) < len(model.layers):
            # They are tried when they run alone, which changes nothing that would be seen here. What was
            # found before is kept, for when all is as it was.
            raise Declined("its layers were not tried yet, or something of them changed since")
        refused, checked, output = "", None, None
        try:
            checked = _checked(model, founds)
            output = _tried(model, checked)
        except Declined as reason:
            refused = str(reason)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # A decoder whose parts lack what the usual ones have is not of the usual form.
            refused = f"its decoder, tried as a whole, is of another form ({type(error).__name__}: {error})"
        # Only now: layers and rotary embeddings may keep what they work out when they first run.
        unchanged = Unchanged(model, hooks=True, copied=[*model.rotary_emb.buffers()])
        return _Looked(unchanged, refused, checked, output)


def _checked(model: Any, founds: list[Found]) -> _Checked:
    """What a step takes of a decoder; `Declined` where its layers cannot run together."""
    config = model.config
    check_usual(config)
    if _are_watched(model) or any(found.is_watched() for found in founds):
        raise Declined(WATCHED)
    if partly := next((found for found in founds if not found.is_whole()), None):
        raise Declined(f"not all layers run wholly in compiled calls: {partly.why_not_whole()}")
    kinds = getattr(config, "layer_types", None)
    turning = Turning(model.rotary_emb)
    own_kinds = kinds if turning.takes_kinds else [None] * len(founds)
    if own_kinds is None or len(own_kinds) < len(founds):
        raise Declined("its rotary embedding asks for kinds of layers, which its configuration does not name")
    dtype, window = model.norm.weight.dtype, getattr(config, "sliding_window", None)
    return _Checked(
        founds,
        [
            _Layer(f.attention, f.mixture, f.shape.num_kv_heads, f.shape.width, kind)
            for f, kind in zip(founds, own_kinds, strict=False)
        ],
        plain_table(model.embed_tokens),
        norm_part(model.norm, "last norm", dtype),
        dtype,
        turning,
        window if isinstance(window, int) else None,
        kinds,
    )


def _tried(model: Any, checked: _Checked) -> _Output:
    """How its results are made, if three tokens and one more come out as from itself; or `Declined`."""
    own: Any = type(model).__mro__[2]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.embed_tokens.num_embeddings, (1, 4), generator=generator)
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for filled in (theirs, ours):
        own.forward(model, tokens[:, :3], **with_cache(filled), use_cache=True)
    expected = own.forward(model, tokens[:, 3:], **with_cache(theirs), use_cache=True)
    if not isinstance(expected, OrderedDict) or set(expected) != _RESULTS:
        raise Declined("its decoder returns other things than hidden states and a cache")
    found, wanted = _step(model, tokens[:, 3:], checked, ours), expected["last_hidden_state"]
    tolerance = 1e-5 if wanted.dtype == torch.float32 else 2e-2
    if not float((found - wanted).float().norm()) <= tolerance * float(wanted.float().norm()):
        raise Declined("its decoder, tried as a whole, computes something else")
    return _Output(type(expected), dict.fromkeys(vars(expected)))


def _step(
    model: Any, ids: Tensor, checked: _Checked, cached: Any, steered: Mapping[int, Any] | None = None
) -> Tensor:
    extension = native()
    assert extension is not None
    dtype = checked.dtype
    x = embedded(model, checked.embedding, ids)
    if type(x) is not Tensor or not is_plain(x) or x.dtype != dtype or not x.is_contiguous():
        raise Declined(f"its embeddings are not contiguous {dtype} in the processor's memory")
    texts = texts_of(cached)
    if any(one.offloading or len(one.layers) < len(checked.layers) for one in texts):
        raise Declined("its cache is offloaded or has fewer layers")
    # All of them before any grows: what declines leaves the cache as it was.
    for number, one in enumerate(checked.layers):
        for text in texts:
            held = text.layers[number]
            if not can_grow(held, x.shape[0] // len(texts), one.num_kv_heads, one.width, dtype):
                raise Declined(f"its cache has a {type(held).__name__}, or other sequences or widths")
    kinds = {one.kind for one in checked.layers}
    turned = checked.turning.at(x, [one.get_seq_length() for one in texts], kinds)
    steps = [
        (
            one.attention,
            one.mixture,
            place_of([t.layers[number] for t in texts], turned[one.kind].turns),
            steered.get(number) if steered else None,
        )
        for number, one in enumerate(checked.layers)
    ]
    # Nobody else has these tokens: what comes out of each layer may take their place.
    tokens = extension.Pass(way_for(dtype), NUMBERS[dtype], *x.shape, x.data_ptr(), x.data_ptr())
    extension.run_layers(tokens, steps, checked.norm.record)
    return x


def why_not_together(model: nn.Module) -> str:
    """Why the last step of a quickened decoder was not one call; nothing where it was."""
    stack = _stacks.get(model)
    return UNTRIED if stack is None else stack.why


def has_stack(model: nn.Module) -> bool:
    """Whether a model's decoder tries to run its layers in one call."""
    return any(isinstance(module, QuickStack) for module in model.modules())


def runs_together(model: nn.Module) -> bool:
    """Whether a quickened decoder was found to run its layers in one call."""
    stack = _stacks.get(model)
    return stack is not None and stack.is_tried


_stacks: WeakKeyDictionary[nn.Module, Stack] = WeakKeyDictionary()


def _are_watched(model: Any) -> bool:
    for name in ("embed_tokens", "norm", "rotary_emb"):
        module = model._modules[name]
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return True
    return bool(model.layers._forward_hooks)
