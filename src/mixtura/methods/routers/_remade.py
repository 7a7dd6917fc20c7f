"""What a router makes of weights that stay as they are while text is generated: made once, not every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

Made = tuple[Tensor, ...]
# Values compared along each axis, to notice changes that bypass PyTorch's own count of them.
_PER_AXIS = 8


@final
class Remade:
    """Tensors made of a module's weights, made again as soon as those could have changed.

    They are kept only while the module is in evaluation and no gradient is wanted; in training they are
    made every time.
    """

    def __init__(self) -> None:
        self._made: Made | None = None
        self._marks: list[Any] = []

    def __reduce__(self) -> tuple[type[Remade], tuple[()]]:
        """A copy makes its own."""
        return Remade, ()

    def of(self, owner: nn.Module, sources: Sequence[Tensor], make: Callable[[], Made]) -> Made:
        """What ``make`` makes of ``sources``, or what it made of them before."""
        fixed = not owner.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not fixed or any(source.is_inference() or source.is_meta for source in sources):
            self._made = None
            return make()
        marks = [_mark(source) for source in sources]
        if self._made is None or not _equal(marks, self._marks):
            self._made, self._marks = make(), marks
        return self._made


def _mark(source: Tensor) -> tuple[tuple[Any, ...], Tensor]:
    steps = tuple(slice(None, None, max(size // _PER_AXIS, 1)) for size in source.shape)
    place = (source.data_ptr(), source._version, source.shape, source.dtype, source.device)
    return place, source.detach()[steps].clone()


def _equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return len(first) == len(second) and all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
