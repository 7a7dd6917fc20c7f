"""The records of attention: its sizes, and what a method of the kind attentions may read.

Import them from `mixtura.types`. Besides the letters there, B are rows of a batch, Q places of a row, H heads
and W features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixtura.errors import SettingError


@final
@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of one layer's attention.

    >>> AttentionShape(d_model=8, num_heads=4, num_key_value_heads=2, d_head=2).num_groups
    2

    Raises:
        SettingError: a size is below 1, heads do not divide, or ``d_head`` is odd.
    """

    d_model: int
    num_heads: int
    num_key_value_heads: int
    d_head: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise SettingError(f"{name} of attention must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_key_value_heads:
            raise SettingError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_heads} and {self.num_key_value_heads}"
            )
        if self.d_head % 2:
            raise SettingError(f"head_dim must be even, for rotary positions, got {self.d_head}")

    @property
    def num_groups(self) -> int:
        """Heads of queries that share one of keys and values."""
        return self.num_heads // self.num_key_value_heads


@runtime_checkable
class Attend(Protocol):
    """Attention of all tokens to all before them, as the model's implementation computes it."""

    def __call__(
        self,
        query: Float[Tensor, "B H Q W"],
        key: Float[Tensor, "B G Q W"],
        value: Float[Tensor, "B G Q W"],
    ) -> tuple[Float[Tensor, "B Q H W"], Float[Tensor, "B H Q C"] | None]:
        """What every head gathers, and its weights where the implementation gives them.

        Keys and values are kept for later tokens; padding, documents and the method's window are masked.
        """


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInput:
    """Everything that a method of the kind attentions may read of a batch.

    Attributes:
        x: the normed tokens.
        cos, sin: of the tokens' rotary positions, ``[B or 1, Q, W]``.
        turns: cosines and sines, ``[B, P, W]``, of any other positions ``[B, P]``.
        attend: ordinary attention, with the cache. Called once at most.
        valid: False for padding.
        sequence_ids: the sequence of each token; two documents packed into a row are two sequences.
        positions: each token's place in its sequence, from 0.
        history: what this method returned in its routing's ``history`` for the earlier tokens of these rows.
        keeping: whether later tokens will follow, so that there is a history to return.
        training: whether the result will be trained on.
        decoding: whether earlier tokens of these rows were seen in earlier calls.
        dropout: the share of attention's weights to drop.
        generator: of all other randomness; without one there is none.
    """

    x: Float[Tensor, "B Q D"]
    cos: Float[Tensor, "_ Q W"]
    sin: Float[Tensor, "_ Q W"]
    turns: Callable[[Int[Tensor, "B P"]], tuple[Tensor, Tensor]]
    attend: Attend
    valid: Bool[Tensor, "B Q"]
    sequence_ids: Int[Tensor, "B Q"]
    positions: Int[Tensor, "B Q"]
    history: Mapping[str, Tensor] = field(default_factory=dict)
    keeping: bool = False
    training: bool = False
    decoding: bool = False
    dropout: float = 0.0
    generator: torch.Generator | None = None
