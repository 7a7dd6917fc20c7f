"""Adapters that have experts of their own, and the base's: all rows of a pass in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from mixtura.kernels import backend
from mixtura.kernels.woven import WovenExperts, run_woven
from mixtura.types import Change, Own


@final
class Weaving:
    """Keeps what was woven of one layer for as long as its adapters and their tensors are the same."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._woven: WovenExperts | None = None

    def __reduce__(self) -> tuple[type[Weaving], tuple[()]]:
        """A copy of a model weaves anew: what the compiled kernels hold are addresses of this one."""
        return Weaving, ()

    def run(
        self,
        base: Any,
        names: Sequence[str | None],
        changes: dict[str, Change],
        given: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """What the experts make of tokens, each with the adapter of its name.

        Args:
            base: the experts, for which `can_weave` says yes with each of the changes.
            names: the adapter of each token, None for none.
            changes: by adapter, what it has in place of some of the experts.
            given: tokens, chosen experts and weights.
        """
        places = {name: place for place, name in enumerate(changes, 1)}
        rows = torch.tensor([places.get(name or "", 0) for name in names], device=given[0].device)
        return run_woven(base, self._made(base, changes), rows, *given)

    def _made(self, base: Any, changes: dict[str, Change]) -> WovenExperts:
        parts = [part.weight for change in changes.values() for part in change.matrices.values()]  # type: ignore[union-attr]
        held = backend.parameters_of(base).tensors()
        key = (*changes, *((t.data_ptr(), t.dtype, t.shape) for t in (*held, *parts)))
        if self._woven is None or key != self._key:
            instead = [_by_expert(change) for change in changes.values()]
            self._key, self._woven = key, WovenExperts(base, instead)
        return self._woven


def can_weave(base: Any, change: Change) -> bool:
    """Whether a change is experts in the base's own width, and the base's are plain and run by mixtura."""
    if base.config._experts_implementation != backend.NAME or change.tokens is not None:
        return False
    if any(hasattr(base, f"mixtura_{name}") for name in ("store", "observer", "exchange")):
        return False
    dtype = backend.parameters_of(base).up.dtype
    parts = change.matrices.values()
    return all(isinstance(part, Own) and part.weight.dtype == dtype for part in parts)


def _by_expert(change: Change) -> dict[int, dict[str, Tensor]]:
    return {
        expert: {name: part.weight.detach()[slot] for name, part in change.matrices.items()}  # type: ignore[union-attr]
        for slot, expert in enumerate(change.expert_ids)
    }
