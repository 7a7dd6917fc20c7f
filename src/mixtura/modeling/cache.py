"""What routers, attentions and adapters remember of earlier tokens, kept among the layers of the cache.

A cache's operations (reordering beams, repeating or choosing sequences) go over its layers, so one
more layer behind those of the attention follows all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mixtura.errors import UserError

History = Mapping[str, Tensor]
# The place of a router among those of the model, or the name of an attention or an adapter.
Owner = int | str


@final
class HistoryLayer(CacheLayerMixin):
    """The history of every router and attention: tensors whose first axis is the sequence."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.histories: dict[Owner, dict[str, Tensor]] = {}

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.histories = {
            owner: {name: change(tensor) for name, tensor in history.items()}
            for owner, history in self.histories.items()
        }

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is reserved."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keys and values are not kept here."""
        raise AssertionError("attention has no layer of this number")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for a layer without tokens."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """No keys are kept."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.histories = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams that go on."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence several times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the sequences."""
        self._map(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what is remembered cannot be taken back token by token.

        Raises:
            UserError: there is something to take back.
        """
        if tokens_to_remove and self.histories:
            raise UserError(
                "this model's routers or attentions remember earlier tokens, which cannot be taken back; "
                "generate without an assistant model"
            )


def recall(cache: object, owner: Owner) -> History:
    """What a router, attention or adapter remembers; empty at the start."""
    kept = _layer_of(cache)
    return {} if kept is None else kept.histories.get(owner, {})


def remember(cache: Cache, histories: Mapping[Owner, History] | Mapping[str, History]) -> None:
    """Keep what routers, attentions and adapters returned as history for the tokens that follow."""
    if not histories:
        return
    kept = _layer_of(cache)
    if kept is None:
        kept = HistoryLayer()
        cache.layers.append(kept)
    for owner, history in histories.items():
        kept.histories[owner] = {name: tensor.detach() for name, tensor in history.items()}


def _layer_of(cache: object) -> HistoryLayer | None:
    if not isinstance(cache, Cache) or not cache.layers:
        return None
    last = cache.layers[-1]
    return last if isinstance(last, HistoryLayer) else None
