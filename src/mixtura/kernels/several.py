"""Several texts, each with a cache of its own, side by side for a step of one token each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


@final
class GatheredLayer(DynamicLayer):
    """One layer of several texts' caches.

    New keys and values go to the texts' own layers. What a model gets to see is a copy of all of them,
    filled up behind the shorter ones, which a mask must shut out.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = tuple(layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a token's keys and values ``[S, H, 1, D]`` of each text; returns those of all tokens."""
        del args, kwargs
        found = [
            layer.update(key_states[row : row + 1], value_states[row : row + 1])
            for row, layer in enumerate(self.layers)
        ]
        longest = max(keys.shape[-2] for keys, _ in found)
        return _padded([keys for keys, _ in found], longest), _padded(
            [values for _, values in found], longest
        )

    def get_seq_length(self) -> int:
        """Tokens of the longest text."""
        return max(int(layer.get_seq_length()) for layer in self.layers)


@final
class SideBySide(Cache):
    """The caches of several texts as one, for one token of each, whatever their lengths.

    Models see keys and values by `GatheredLayer`; the compiled step reads each text's where they lie.
    """

    def __init__(self, caches: Sequence[DynamicCache]) -> None:
        layers = [GatheredLayer(layers) for layers in zip(*(one.layers for one in caches), strict=True)]
        super().__init__(layers=layers)
        self.caches = tuple(caches)
        self.lengths = tuple(int(one.get_seq_length()) for one in caches)

    def mask(self) -> Tensor:
        """What each text sees, ``[S, longest + 1]``: its own tokens and the new one."""
        lengths = torch.tensor(self.lengths)
        return (torch.arange(int(lengths.max()) + 1) <= lengths[:, None]).long()

    def places(self) -> Tensor:
        """Where the new tokens stand, ``[S, 1]``."""
        return torch.tensor(self.lengths)[:, None]


def _padded(parts: Sequence[Tensor], length: int) -> Tensor:
    first = parts[0]
    # Zeros and not what lay there before: a weight of nothing times that must be nothing.
    made = first.new_zeros(len(parts), first.shape[1], length, first.shape[3])
    for row, part in enumerate(parts):
        made[row, :, : part.shape[-2]] = part[0]
    return made
