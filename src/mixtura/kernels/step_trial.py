"""A decoder layer's parts, tried on random tokens against the layer's own ``forward``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mixtura.kernels.backend import NAME
from mixtura.kernels.step_calls import Around, Tables, run_attention, run_mixture
from mixtura.kernels.step_parts import AttentionShape, Part, attention_parts, dtype_of, mixture_part

# Of the norm of what a layer adds to its tokens; and the tokens that may differ more, where routers are torn.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
_MOST_DIFFERENT: Final = {torch.float32: 0, torch.bfloat16: 1}
# Small beside what a layer adds, so that rounding the sum hides nothing; norms make it any size.
_SIZE: Final = 0.02


@final
@dataclass(slots=True)
class Found:
    """Parts of a layer that the compiled calls run as the layer does.

    Attributes:
        attention: the extension's record of norm and attention, or None.
        mixture: that of the second norm and what follows, or None.
        shape: of the attention.
        experts: the experts module, where the mixture has one.
    """

    attention: Any = None
    mixture: Any = None
    shape: AttentionShape = field(default_factory=lambda: AttentionShape(1, 1, 1))
    experts: Any = None
    holds: list[object] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    classes: list[type] = field(default_factory=list)
    members: list[dict[str, Any]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    hooks: list[dict[int, Any]] = field(default_factory=list)
    own: list[dict[str, Any]] = field(default_factory=list)
    store: object = None

    @property
    def is_idle(self) -> bool:
        """Whether the layer runs as it is."""
        return self.attention is None and self.mixture is None

    def is_whole(self) -> bool:
        """Whether compiled calls run all of the layer."""
        return self.attention is not None and self.mixture is not None and self._chosen()

    def _chosen(self) -> bool:
        """Whether the model wants its experts run by this library."""
        return self.experts is None or self.experts.config._experts_implementation == NAME

    def watch(self, layer: nn.Module) -> None:
        """Remember what the records were made of."""
        # Without the layer, which is the weak key of what is remembered here.
        self.modules = list(layer.modules())[1:]
        self.classes = [*map(type, self.modules)]
        for module in (layer, *self.modules):
            self.members += [module._modules, module._parameters, module._buffers]
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
            self.own.append(module.__dict__)
        self.ids = self._ids()
        self.tensors = [*layer.parameters(), *layer.buffers()]
        self.addresses = [*map(Tensor.data_ptr, self.tensors)]
        self.store = getattr(self.experts, "mixtura_store", None)

    def _ids(self) -> list[int]:
        return [*map(id, chain.from_iterable(map(dict.values, self.members)))]

    def is_intact(self) -> bool:
        """Whether the layer still has the modules and tensors that were found."""
        return (
            [*map(type, self.modules)] == self.classes
            and self._ids() == self.ids
            and [*map(Tensor.data_ptr, self.tensors)] == self.addresses
            and (self.experts is None or self.experts.__dict__.get("mixtura_store") is self.store)
        )

    def is_watched(self) -> bool:
        """Whether somebody wants to see what a module of the layer gets or gives."""
        shared = nn.modules.module
        if any(self.hooks) or shared._global_forward_hooks or shared._global_forward_pre_hooks:
            return True
        if any("forward" in own for own in self.own):
            return True
        return self.experts is not None and self.experts.__dict__.get("mixtura_observer") is not None

    def run(self, layer: Any, x: Tensor, around: Around, named: dict[str, Any]) -> Tensor:
        """The layer's result for ``x``; ``named`` are the arguments of its ``forward``."""
        if self.attention is not None:
            x = run_attention(x, self.attention, self.shape, around)
        else:
            x = x + layer.self_attn(hidden_states=layer.input_layernorm(x), **named)[0]
        if self.mixture is not None and self._chosen():
            return run_mixture(x, self.mixture)
        made = layer.mlp(layer.post_attention_layernorm(x))
        added: Tensor = made[0] if isinstance(made, tuple) else made
        return x + added


@torch.no_grad()
def find_parts(layer: Any, own: type[nn.Module], x: Tensor, around: Around) -> Found:
    """What the compiled calls can run of ``layer``, whose own class is ``own``, tried beside it."""
    found = Found()
    dtype = dtype_of(layer)
    found.experts = getattr(layer.mlp, "experts", None)
    found.watch(layer)
    if dtype == x.dtype and not found.is_watched():
        for attention, shape, mixture in _choices(layer, dtype):
            found.attention = None if attention is None else attention.record
            found.mixture = None if mixture is None else mixture.record
            found.shape = shape
            if _agrees_at_all(layer, own, found, x, around):
                found.holds = [attention, mixture]
                break
            found.attention = found.mixture = None
    return found


def _choices(layer: Any, dtype: torch.dtype) -> Iterator[tuple[Part | None, AttentionShape, Part | None]]:
    """Both halves, then each alone."""
    attention = attention_parts(layer, dtype)
    mixture = mixture_part(layer, dtype)
    shape, rotated = (AttentionShape(1, 1, 1), []) if attention is None else attention
    if mixture is not None:
        yield from ((part, shape, mixture) for part in rotated)
    yield from ((part, shape, None) for part in rotated)
    if mixture is not None:
        yield None, shape, mixture


def _agrees_at_all(layer: Any, own: type[nn.Module], found: Found, x: Tensor, around: Around) -> bool:
    try:
        return _agrees(layer, own, found, x, around)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        # A layer that wants more than the usual arguments is not of the usual form.
        return False


def _agrees(layer: Any, own: type[nn.Module], found: Found, x: Tensor, around: Around) -> bool:
    """Whether three tokens and then one more come out as from the layer itself, keys and values too."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 4, x.shape[2], generator=generator).to(x.dtype) * _SIZE
    theirs, ours = DynamicCache(), DynamicCache()
    for first, last in ((0, 3), (3, 4)):
        part = tokens[:, first:last].contiguous()
        tables = Tables(*(table[:1, -1:].expand(1, last - first, -1).contiguous() for table in around.tables))
        mask = None
        if layer.self_attn.config._attn_implementation == "eager":
            mask = torch.full((1, 1, last - first, last), torch.finfo(x.dtype).min, dtype=x.dtype).triu(
                1 + first
            )
        named = {"position_embeddings": tuple(tables), "attention_mask": mask}
        expected = own.forward(layer, part, **named, past_key_values=theirs)
        if not isinstance(expected, Tensor):
            return False
        made = found.run(
            layer, part, Around(tables, mask, ours, around.layer_index), {**named, "past_key_values": ours}
        )
        if not _is_close(made - part, expected - part):
            return False
    index = around.layer_index
    pairs = (
        (theirs.layers[index].keys, ours.layers[index].keys),
        (theirs.layers[index].values, ours.layers[index].values),
    )
    return all(a.shape == b.shape and _is_close(b.flatten(0, 2), a.flatten(0, 2)) for a, b in pairs)


def _is_close(made: Float[Tensor, "... D"], expected: Float[Tensor, "... D"]) -> bool:
    errors = (made - expected).float().norm(dim=-1).flatten()
    sizes = expected.float().norm(dim=-1).flatten()
    different = int((~(errors <= _TOLERANCE[made.dtype] * sizes)).sum())
    return different <= min(_MOST_DIFFERENT[made.dtype], len(errors) - 1)
