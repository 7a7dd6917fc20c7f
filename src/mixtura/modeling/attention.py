"""Rotary grouped-query attention through transformers' attention interface."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixtura.machine.releases import takes_cache
from mixtura.modeling.config import MixturaConfig


@final
class RMSNorm(nn.Module):
    """Divide by the root mean square in float32, then scale each feature."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*n W"]) -> Float[Tensor, "*n W"]:
        """The normed features in the dtype of ``x``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


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


def rotated(x: Float[Tensor, "B H Q W"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B H Q W"]:
    """Queries or keys turned by their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


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
class MixturaAttention(nn.Module):
    """Grouped-query attention with rotary positions; queries and keys normed or not."""

    def __init__(self, config: MixturaConfig, layer: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = None
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias)
        widths = {"none": None, "head": (config.head_dim,) * 2, "full": (queries, keys)}[
            config.query_key_norm
        ]
        self.q_norm = RMSNorm(widths[0], config.rms_norm_eps) if widths else None
        self.k_norm = RMSNorm(widths[1], config.rms_norm_eps) if widths else None

    def _heads(self, x: Tensor, projection: nn.Linear, norm: RMSNorm | None) -> Float[Tensor, "B H Q W"]:
        features = projection(x)
        if norm is not None and self.config.query_key_norm == "full":
            features = norm(features)
        heads = features.view(*x.shape[:-1], -1, self.head_dim)
        if norm is not None and self.config.query_key_norm == "head":
            heads = norm(heads)
        turned: Tensor = heads.transpose(1, 2)
        return turned

    @takes_cache
    def forward(
        self,
        x: Float[Tensor, "B Q D"],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B H Q C"] | None]:
        """What tokens gather from earlier ones, and the weights where the implementation gives them."""
        query = rotated(self._heads(x, self.q_proj, self.q_norm), *position_embeddings)
        key = rotated(self._heads(x, self.k_proj, self.k_norm), *position_embeddings)
        value = self._heads(x, self.v_proj, None)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)
        name = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        dropout = float(self.config.attention_dropout) if self.training else 0.0
        gathered, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=None,
            **kwargs,
        )
        return self.o_proj(gathered.reshape(*x.shape[:-1], -1).contiguous()), weights
