"""A decoder layer's parts, tried on random tokens against the layer's own ``forward``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mixtura.kernels.backend import NAME
from mixtura.kernels.declined import Declined
from mixtura.kernels.records import rehearsal
from mixtura.kernels.step_calls import Around, Tables, run_attention, run_mixture
from mixtura.kernels.step_parts import AttentionShape, Part, attention_parts, dtype_of, mixture_part
from mixtura.kernels.step_watch import Unchanged
from mixtura.machine.releases import with_cache

# Of the norm of what a layer adds to its tokens; and the tokens that may differ more, where routers are torn.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
_MOST_DIFFERENT: Final = {torch.float32: 0, torch.bfloat16: 1}
# Small beside what a layer adds, so that rounding the sum hides nothing; norms make it any size.
_SIZE: Final = 0.02
# Why a layer takes its own path for now.
WATCHED: Final = "something looks on, or stands in, inside: a hook, an observer or another forward"


@final
@dataclass(slots=True)
class Found:
    """Parts of a layer that the compiled calls run as the layer does.

    Attributes:
        attention: the extension's record of norm and attention, or None.
        mixture: that of the second norm and what follows, or None.
        shape: of the attention.
        experts: the experts module, where the mixture has one.
        why_attention: why the attention is not run so; nothing where it is.
        why_mixture: the same of what follows it.
    """

    attention: Any = None
    mixture: Any = None
    shape: AttentionShape = field(default_factory=lambda: AttentionShape(1, 1, 1))
    experts: Any = None
    why_attention: str = ""
    why_mixture: str = ""
    _holds: list[object] = field(default_factory=list)
    _hooks: list[dict[int, Any]] = field(default_factory=list)
    _own: list[dict[str, Any]] = field(default_factory=list)
    _unchanged: Unchanged | None = None

    @property
    def is_idle(self) -> bool:
        """Whether the layer runs as it is."""
        return self.attention is None and self.mixture is None

    def why_not_whole(self) -> str:
        """Why not all of the layer runs in compiled calls; nothing where it does."""
        return self.why_attention or self.why_mixture or self._why_not_chosen()

    def is_whole(self) -> bool:
        """Whether compiled calls run all of the layer."""
        return self.attention is not None and self.mixture is not None and self._chosen()

    def _chosen(self) -> bool:
        """Whether the model wants its experts run by this library."""
        return self.experts is None or self.experts.config._experts_implementation == NAME

    def _why_not_chosen(self) -> str:
        if self._chosen():
            return ""
        return f"its experts are to run by the implementation {self.experts.config._experts_implementation!r}"

    def take(self, attention: Part | None, shape: AttentionShape, mixture: Part | None) -> None:
        """Run these parts, or none."""
        self.attention = None if attention is None else attention.record
        self.mixture = None if mixture is None else mixture.record
        self.shape, self._holds = shape, [attention, mixture]

    def watch(self, layer: nn.Module) -> None:
        """Remember what could make the records wrong, and where somebody would want to look on."""
        for module in layer.modules():
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            self._own.append(module.__dict__)

    def keep(self, layer: nn.Module) -> None:
        """From now on `is_intact` tells whether the layer is what it is now."""
        self._unchanged = Unchanged(layer, hooks=False)

    def is_intact(self, layer: nn.Module) -> bool:
        """Whether the layer still is what was looked through."""
        return self._unchanged is not None and self._unchanged.holds_for(layer)

    def is_watched(self) -> bool:
        """Whether somebody wants to see what a module of the layer gets or gives."""
        shared = nn.modules.module
        if any(self._hooks) or shared._global_forward_hooks or shared._global_forward_pre_hooks:
            return True
        if any("forward" in own for own in self._own):
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
    if dtype != x.dtype:
        found.why_attention = found.why_mixture = f"its first norm has no weight in the tokens' {x.dtype}"
    elif found.is_watched():
        found.why_attention = found.why_mixture = WATCHED
    else:
        _find(layer, own, found, x, around)
    # Last, since modules may keep what they work out when they first run.
    found.keep(layer)
    return found


def _find(layer: Any, own: type[nn.Module], found: Found, x: Tensor, around: Around) -> None:
    """Both halves, then each alone."""
    shape, rotated, mixture = AttentionShape(1, 1, 1), list[Part](), None
    try:
        shape, rotated = attention_parts(layer, x.dtype)
    except Declined as reason:
        found.why_attention = str(reason)
    try:
        mixture = mixture_part(layer, x.dtype)
    except Declined as reason:
        found.why_mixture = str(reason)
    for attention, following in _choices(rotated, mixture):
        found.take(attention, shape, following)
        if _agrees_at_all(layer, own, found, x, around):
            break
        found.take(None, shape, None)
    if found.attention is None:
        found.why_attention = found.why_attention or "its attention, tried, computes something else"
    if found.mixture is None:
        found.why_mixture = found.why_mixture or "what follows its attention, tried, computes something else"


def _choices(rotated: list[Part], mixture: Part | None) -> Iterator[tuple[Part | None, Part | None]]:
    if mixture is not None:
        yield from ((part, mixture) for part in rotated)
    yield from ((part, None) for part in rotated)
    if mixture is not None:
        yield None, mixture


def _agrees_at_all(layer: Any, own: type[nn.Module], found: Found, x: Tensor, around: Around) -> bool:
    try:
        with rehearsal(found.experts):
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
        expected = own.forward(layer, part, **named, **with_cache(theirs))
        if not isinstance(expected, Tensor):
            return False
        made = found.run(
            layer, part, Around(tables, mask, ours, around.layer_index), {**named, **with_cache(ours)}
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
