"""Made-up texts and what an attention gathers in them, run as a model runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from mixtura.methods.attentions import Attended, Attention
from mixtura.modeling.attention import MixturaRotaryEmbedding, attend, told_alike
from mixtura.modeling.cache import remember
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.tokens import describe
from mixtura.types import AttentionShape

SHAPE = AttentionShape(d_model=16, num_heads=4, num_key_value_heads=2, d_head=4)
ROWS, PLACES = 2, 13


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Normed tokens of some rows.

    Attributes:
        x: the tokens.
        mask: False for padding, of these and all earlier places; None for none.
        position_ids: where they start again, another document begins; None where they do not.
        training: whether the result will be trained on.
    """

    x: Float[Tensor, "B Q D"]
    mask: Bool[Tensor, "B C"] | None = None
    position_ids: Int[Tensor, "B Q"] | None = None
    training: bool = False


def text(seed: int, rows: int = ROWS, places: int = PLACES, dtype: torch.dtype = torch.float32) -> Text:
    """A made-up text."""
    generator = torch.Generator().manual_seed(seed)
    return Text(x=torch.randn(rows, places, SHAPE.d_model, generator=generator).to(dtype))


def config(implementation: str = "sdpa") -> MixturaConfig:
    """Of a model with one attention of these sizes."""
    return MixturaConfig(
        hidden_size=SHAPE.d_model,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_key_value_heads,
        head_dim=SHAPE.d_head,
        num_hidden_layers=1,
        attn_implementation=implementation,
    )


def gather(
    method: Attention,
    given: Text,
    cache: DynamicCache | None = None,
    past: int | None = None,
    implementation: str = "sdpa",
) -> Attended:
    """What a method makes of a text; with a cache after the ``past`` places that it has."""
    rows, places = given.x.shape[:2]
    positions = given.position_ids
    if positions is None:
        positions = (torch.arange(places) + (past or 0))[None]
    made = config(implementation)
    common = told_alike(
        [method.window], made, MixturaRotaryEmbedding(made), given.x, given.mask, positions, cache
    )
    tokens = describe(
        size=(rows, places),
        device=given.x.device,
        input_ids=None,
        attention_mask=given.mask,
        position_ids=positions,
        past_length=past,
        token_labels=None,
    )
    found = attend(method.train(given.training), made, given.x, tokens, None, common)
    if cache is not None and found[2] is not None and found[2].history:
        remember(cache, {f"attention.{method.layer_idx}": found[2].history})
    return found


def piecewise(method: Attention, given: Text, cuts: Sequence[int]) -> Float[Tensor, "B Q D"]:
    """What a method makes of a text that comes in pieces, which end at ``cuts`` and at its end."""
    cache = DynamicCache(config=config())
    parts, start = [], 0
    for end in (*cuts, given.x.shape[1]):
        mask = None if given.mask is None else given.mask[:, :end]
        places = None if given.position_ids is None else given.position_ids[:, start:end]
        part = replace(given, x=given.x[:, start:end], mask=mask, position_ids=places)
        parts.append(gather(method, part, cache, past=start)[0])
        start = end
    return torch.cat(parts, dim=1)
