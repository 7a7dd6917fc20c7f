"""A dense feed-forward part of a model that adapters make several experts of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.adapting.changing import low_rank_rows
from mixtura.adapting.layers import AdapterLayer
from mixtura.adapting.losses import LossBox
from mixtura.checkpoints.viewing.wrappers import inner
from mixtura.errors import UnsupportedModelError
from mixtura.types import Change, LowRank

PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def is_block(module: nn.Module) -> bool:
    """Whether a module is gated and of three linear layers, as most families call them."""
    parts = [getattr(module, name, None) for name in PROJECTIONS.values()]
    return callable(getattr(module, "act_fn", None)) and all(
        isinstance(part, nn.Module) and isinstance(getattr(inner(part), "in_features", None), int)
        for part in parts
    )


def projections(module: nn.Module) -> dict[str, Any]:
    """The three linear layers of a block by the names of its matrices, without what adapters add to them."""
    return {name: inner(module.get_submodule(long)) for name, long in PROJECTIONS.items()}


@final
class BlockLayer(AdapterLayer):
    """A feed-forward part with adapters, whose experts are the base's with thin factors of their own.

    The weights of a token's experts sum to 1. So what they make together is the base's down projection of
    ``h + sum of weight * (h_e - h)``, plus what is added behind it: one product for all, and the base's own
    bits where nothing is added. Its linear layers may have adapters, too, which are then in all experts.
    """

    def __init__(self, base_layer: nn.Module, losses: LossBox) -> None:
        super().__init__(base_layer, losses)
        self.register_load_state_dict_pre_hook(_to_base)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """What the base makes of tokens, or its experts with the weights that adapters give them."""
        if self.by_row is None:
            return self._made(x, self.running)
        made, seen = torch.empty_like(x), x.reshape(-1, x.shape[-1])
        for name, rows in self.rows_of(seen.shape[0]).items():
            made.view_as(seen)[rows] = self._made(seen[rows], [] if name is None else [name])
        return made

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base alone, its linear layers without their adapters, too."""
        base = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for name, layer in _adapted(base).items():
            plain = layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            setattr(base, name, plain)
        return base

    def _made(self, x: Tensor, running: Sequence[str]) -> Tensor:
        base: Any = self.base_layer
        if not running:
            made: Tensor = base(x)
            return made
        rows = x.reshape(-1, x.shape[-1])
        changes = [self._change(name, rows) for name in running]
        gate, up = base.gate_proj(rows), base.up_proj(rows)
        hidden = base.act_fn(gate) * up
        moved, added = hidden, torch.zeros_like(rows)
        for change in changes:
            moved, added = self._experts(change, rows, (gate, up), (moved, added))
        made = base.down_proj(moved) + added
        for name, change in zip(running, changes, strict=True):
            made = self._with_losses(name, made, change)
        return made.view(x.shape)

    def _experts(
        self,
        change: Change,
        x: Tensor,
        base: tuple[Tensor, Tensor],
        sums: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """What experts add to the hidden features and behind them, each for its own tokens alone."""
        assert change.shares is not None
        gate, up = base
        moved, added = sums
        for expert in range(change.shares.shape[1]):
            ids = change.shares[:, expert].nonzero()[:, 0]
            weights = change.shares[ids, expert, None]
            seen = F.dropout(x[ids], change.dropout) if change.dropout > 0 else x[ids]
            before, beside = gate[ids], up[ids]
            own = self._act(before + _part(change, "gate", expert, seen, gate)) * (
                beside + _part(change, "up", expert, seen, up)
            )
            # Of the same rows at the same places, since an activation's last bit can depend on the place.
            apart = own - self._act(before) * beside
            moved = moved.index_add(0, ids, (apart * weights).to(moved.dtype))
            inside = F.dropout(own, change.dropout) if change.dropout > 0 else own
            more = _part(change, "down", expert, inside, added) * weights
            added = added.index_add(0, ids, more.to(added.dtype))
        return moved, added

    def _act(self, x: Tensor) -> Tensor:
        base: Any = self.base_layer
        made: Tensor = base.act_fn(x)
        return made

    def matrices(self) -> dict[str, Tensor]:
        return {name: part.weight.detach() for name, part in projections(self.base_layer).items()}

    def held(self) -> dict[str, Tensor]:
        return {}

    def write(self, changes: Sequence[Change]) -> None:
        raise AssertionError("experts that tokens choose cannot be written into one part")


def require_plain(module: Any, name: str) -> None:
    """Raise `UnsupportedModelError` unless a block computes what its three layers and activation say."""
    weight: Tensor = inner(module.gate_proj).weight  # type: ignore[assignment]
    if weight.is_meta:
        return
    x = torch.linspace(-1.0, 1.0, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad(), _plain(module):
        wanted = module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
        if not torch.equal(module(x), wanted):
            raise UnsupportedModelError(
                f"{name} computes something besides its three layers and the activation between them; choose "
                "an adapter for linear layers"
            )


def _part(change: Change, name: str, expert: int, x: Tensor, like: Tensor) -> Tensor:
    part = change.matrices[name]
    assert isinstance(part, LowRank)
    one = LowRank(part.a[expert, None], part.b[expert, None], part.scale[expert, None])
    return low_rank_rows(x, one, None).to(like.dtype)


def _adapted(block: nn.Module) -> dict[str, AdapterLayer]:
    """The linear layers of a block that have adapters, by name."""
    return {name: one for name, one in block.named_children() if isinstance(one, AdapterLayer)}


@contextmanager
def _plain(block: nn.Module) -> Iterator[None]:
    """A block without what adapters of its linear layers add, for now."""
    layers = _adapted(block)
    for name, layer in layers.items():
        setattr(block, name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            setattr(block, name, layer)


@contextmanager
def without_blocks(model: nn.Module) -> Iterator[None]:
    """A model with its blocks as they were before they had adapters, for now.

    PEFT puts no adapter into what has one already. So those of a block's linear layers come in meanwhile.
    """
    found = [(name, one) for name, one in model.named_modules() if isinstance(one, BlockLayer)]
    for name, layer in found:
        model.set_submodule(name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in found:
            model.set_submodule(name, layer)


def _to_base(block: nn.Module, saved: dict[str, Any], prefix: str, *_: Any) -> None:
    """Tensors of a block's linear layers are saved by the names that they have where the block is plain."""
    for key in list(saved):
        if key.startswith(tuple(f"{prefix}{name}." for name in PROJECTIONS.values())):
            saved[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = saved.pop(key)
