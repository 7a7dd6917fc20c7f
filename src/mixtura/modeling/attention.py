"""Methods of the kind attentions in a model: through transformers' interface, with rotary positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixtura.machine.releases import CACHE, CACHE_NAMES, given_cache, with_cache
from mixtura.methods import create
from mixtura.methods.attentions import Attended, Attention
from mixtura.modeling.cache import recall
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.seeds import ATTENTION, part_seed
from mixtura.modeling.tokens import Tokens
from mixtura.types import AttentionInput, AttentionShape


@final
class MixturaRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions, of any kind that transformers knows."""

    def __init__(self, config: MixturaConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]  # type: ignore[index]
        start = self.compute_default_rope_parameters
        self.attention_scaling: float
        inverse, self.attention_scaling = (
            start(config) if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type](config)
        )
        self.inv_freq = nn.Buffer(inverse, persistent=False)
        self.original_inv_freq = nn.Buffer(inverse.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: Any, **_: Any) -> tuple[Tensor, float]:
        """Inverse frequencies of the plain kind, and the factor of its cosines."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, position_ids: Int[Tensor, "B Q"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, Q, head]`` in the dtype of ``x``."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        both = torch.cat((angles, angles), dim=-1)
        scaled = (both.cos() * self.attention_scaling, both.sin() * self.attention_scaling)
        return scaled[0].to(x.dtype), scaled[1].to(x.dtype)


def eager_attention(
    module: Any,
    query: Float[Tensor, "B H Q W"],
    key: Float[Tensor, "B G C W"],
    value: Float[Tensor, "B G C W"],
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "B Q H W"], Float[Tensor, "B H Q C"]]:
    """Attention whose weights can be looked at; the mask is added to the scores."""
    groups = module.num_key_value_groups
    keys, values = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ keys.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    exact = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=exact).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ values).transpose(1, 2).contiguous(), weights


@final
class Attending:
    """Ordinary attention of one layer: the model's implementation, with its cache, masks and window.

    Args:
        module: the method whose heads attend.
        config: of the model.
        masks: by window, as transformers makes them.
        cache: of keys and values; None without one.
        others: what implementations are told besides.
    """

    def __init__(
        self,
        module: Attention,
        config: MixturaConfig,
        masks: Mapping[int | None, Any],
        cache: Any,
        others: Mapping[str, Any],
    ) -> None:
        self._module, self._config, self._cache, self._others = module, config, cache, others
        self._mask = masks[module.window]
        self._called = False

    @property
    def dropout(self) -> float:
        """The share of weights to drop."""
        return float(self._config.attention_dropout) if self._module.training else 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `mixtura.types.Attend`."""
        self._called = True
        if self._cache is not None:
            key, value = self._cache.update(key, value, self._module.layer_idx, kwargs=dict(self._others))
        name = self._config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        found: tuple[Tensor, Tensor | None] = attend(
            self._module,
            query,
            key,
            value,
            self._mask,
            dropout=self.dropout,
            scaling=self._module.scaling,
            sliding_window=self._module.window,
            **self._others,
        )
        return found

    def close(self, x: Float[Tensor, "B Q D"]) -> None:
        """Let the cache know how many tokens there were where the method kept no keys in it."""
        if self._cache is not None and not self._called:
            # A cache takes keys without features for no keys at all, so each has one.
            nothing = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            self._cache.update(nothing, nothing, self._module.layer_idx, kwargs=dict(self._others))


def make_attentions(config: MixturaConfig) -> tuple[Attention, ...]:
    """The attention of every decoder layer.

    Raises:
        UserError: a setting of a method is wrong.
    """
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    shape = AttentionShape(
        d_model=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        d_head=config.head_dim,
    )
    made = []
    for layer, choice in enumerate(config.attentions):
        values = choice.with_defaults(
            "attentions",
            seed=part_seed(config.seed, layer, ATTENTION),
            bias=config.attention_bias,
            query_key_norm=config.query_key_norm,
            eps=config.rms_norm_eps,
        )
        one: Attention = create("attentions", choice.name, shape, **values)
        one.layer_idx = layer
        one.rescale(config.initializer_range)
        made.append(one)
    return tuple(made)


def told_alike(
    windows: Iterable[int | None],
    config: MixturaConfig,
    rotary: MixturaRotaryEmbedding,
    x: Float[Tensor, "B Q D"],
    attention_mask: Any,
    position_ids: Int[Tensor, "_ Q"],
    cache: Any,
) -> dict[str, Any]:
    """What the attentions of all layers are told alike: masks by window, positions, and the cache."""
    given = {"config": config, "inputs_embeds": x, "attention_mask": attention_mask}
    overlays: dict[int | None, dict[str, Any]] = {None: {}}
    for window in windows:
        if window is not None:
            overlays[window] = {"and_mask_function": sliding_window_overlay(window)}
    masks = {
        window: create_causal_mask(**given, position_ids=position_ids, **{CACHE: cache}, **overlay)
        for window, overlay in overlays.items()
    }
    return {
        "attention_mask": masks,
        "position_embeddings": rotary(x, position_ids),
        "turns": rotary,
        "position_ids": position_ids,
        **with_cache(cache),
    }


def attend(
    attention: Attention,
    config: MixturaConfig,
    x: Float[Tensor, "B Q D"],
    tokens: Tokens,
    generator: torch.Generator | None,
    given: Mapping[str, Any],
) -> Attended:
    """What a layer's attention makes of normed tokens; ``given`` is what `told_alike` says, and more."""
    cache = given_cache(given)
    own = ("attention_mask", "position_embeddings", "turns", *CACHE_NAMES)
    others = {name: value for name, value in given.items() if name not in own}
    attending = Attending(attention, config, given["attention_mask"], cache, others)
    cos, sin = given["position_embeddings"]
    size = x.shape[:2]
    attended: Attended = attention(
        AttentionInput(
            x=x,
            cos=cos,
            sin=sin,
            turns=partial(given["turns"], x),
            attend=attending,
            valid=tokens.valid.view(size),
            sequence_ids=tokens.sequence_ids.view(size),
            positions=tokens.positions.view(size),
            history=recall(cache, history_name(attention)),
            keeping=isinstance(cache, Cache),
            training=attention.training,
            decoding=tokens.decoding,
            dropout=attending.dropout,
            generator=generator,
        )
    )
    attending.close(x)
    return attended


def history_name(attention: Attention) -> str:
    """Under which name the cache has what an attention remembers."""
    return f"attention.{attention.layer_idx}"
