"""One layer's experts as the kernels ask for them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.kernels import ExpertTensors, NativeLayer
from mixtura.kernels.compiled import NUMBERS
from mixtura.running.tiers.core import Tiers

# Parts in which the experts of a call of many tokens come, at most, while there is room for all.
_PARTS: Final = 4
# Outputs of experts that came before lower ones, until these are there. More tokens take experts in order.
MOST_WAITING_BYTES: Final = 4 << 20
_DTYPES: Final = {number: dtype for dtype, number in NUMBERS.items()}


@final
class TieredStore:
    """An `ExpertStore` whose experts are in memory in part: those a call needs are brought before it runs.

    Args:
        tiers: the experts of all layers.
        layer: the number of this one among them.
        d_model: width of its tokens.
    """

    def __init__(self, tiers: Tiers, layer: int, d_model: int) -> None:
        self.tiers = tiers
        self.layer = layer
        self._recipe = tiers.recipes[layer]
        self.num_experts = self._recipe.num_experts
        self.like = self._recipe.like
        self._d_model = d_model
        self._expected: tuple[int, ...] = ()
        self._x: Tensor | None = None
        self._native: NativeLayer | None = None
        self._has_native = True
        self._addresses: list[int] = []

    def get(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """One expert, to keep."""
        lent = self.lend(expert, dtype)
        return ExpertTensors(*(None if one is None else one.clone() for one in lent))  # type: ignore[arg-type]

    def expect(self, experts: Sequence[int], num_rows: Sequence[int], x: Float[Tensor, "T D"] | None) -> None:
        """The experts that will be asked for next, in this order; ``x`` where a call begins."""
        self._expected = tuple(experts)
        self._x = x.float() if x is not None and self.tiers.wants_tokens else None
        if x is not None:
            self.tiers.announce(self.layer, experts, num_rows, self._x)

    def lend(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """One expert as it lies in memory, until the next is asked for."""
        if not self.tiers.is_here(self.layer, expert):
            known = expert in self._expected
            rest = self._expected[self._expected.index(expert) :] if known else (expert,)
            self.tiers.bring(self.layer, rest, self._x, in_order=1)
        return self._recipe.tensors(expert, self.tiers.memory(self.layer, expert), dtype)

    def rehearsing(self) -> AbstractContextManager[None]:
        """Until it ends, a few experts stand in for all."""
        return self.tiers.rehearsing(self.layer)

    def native_layer(self) -> NativeLayer | None:
        """The experts for the compiled kernels, which have them brought; None where they cannot read them."""
        if self._native is None and self._has_native:
            self._native = self._made()
            self._has_native = self._native is not None
        return self._native

    def _made(self) -> NativeLayer | None:
        """Records of all experts, as if each lay in the first slot of its size."""
        experts, self._addresses = [], []
        for expert in range(self.num_experts):
            memory = self.tiers.pool(self.layer, expert).memory(0)
            matrices = self._recipe.matrices(expert, memory)
            if matrices is None:
                return None
            experts.append(matrices)
            self._addresses.append(memory.data_ptr())
        made = NativeLayer.of(experts)
        if made is not None:
            made.record.set_fetch(_fetching(weakref.ref(self)), MOST_WAITING_BYTES)
        return made

    def fetch(
        self,
        experts: Sequence[int],
        num_rows: Sequence[int],
        begins: bool,
        x: Tensor | None,
        in_order: bool,
    ) -> list[int]:
        """Bring some of the experts that a call still needs to where their records say; see `Tiers.bring`.

        Args:
            experts: what a call still needs, ascending.
            num_rows: tokens of each.
            begins: whether the call has the layer's tokens: only the first half of one does.
            x: those tokens, where anybody looks at them.
            in_order: whether they must come in their order.

        Returns:
            Places among ``experts``.
        """
        if begins and tuple(experts) != self._expected:
            self.tiers.announce(self.layer, experts, num_rows, x)
        # A call of many tokens prepares them anew for each part of its experts.
        least = -(-len(experts) // _PARTS) if in_order else 0
        come = self.tiers.bring(self.layer, experts, x, in_order=least)
        here = set(come)
        self._expected = tuple(expert for place, expert in enumerate(experts) if place not in here)
        assert self._native is not None
        for expert in (experts[place] for place in come):
            address = self.tiers.memory(self.layer, expert).data_ptr()
            if address != self._addresses[expert]:
                self._native.record.shift(expert, address - self._addresses[expert])
                self._addresses[expert] = address
        return come

    def tokens(self, address: int, number: int, stride: int, num_tokens: int) -> Tensor | None:
        """A call's tokens, copied from where the kernels have them, where anybody looks at them."""
        if not address or not self.tiers.wants_tokens:
            return None
        dtype = _DTYPES[number]
        count = (num_tokens - 1) * stride + self._d_model
        held = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
        flat = torch.frombuffer(held, dtype=dtype)
        return flat.as_strided((num_tokens, self._d_model), (stride, 1)).float()

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would share the pool's slots without knowing it."""
        raise TypeError("a model that runs from memory and disk cannot be copied or pickled; load it again")


def _fetching(
    store: weakref.ref[TieredStore],
) -> Callable[[list[int], list[int], int, int, int, int, bool], list[int]]:
    """What the kernels call. It must not keep the store, which keeps the kernels' record, which keeps it."""

    def fetch(
        experts: list[int],
        num_rows: list[int],
        address: int,
        number: int,
        stride: int,
        num_tokens: int,
        in_order: bool,
    ) -> list[int]:
        one = store()
        assert one is not None
        x = one.tokens(address, number, stride, num_tokens)
        return one.fetch(experts, num_rows, bool(address), x, in_order)

    return fetch
