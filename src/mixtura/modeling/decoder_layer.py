"""One layer of the decoder: attention, and a feed-forward part of experts or a dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from mixtura.errors import UserError
from mixtura.methods import declared_tags
from mixtura.methods._norms import RMSNorm
from mixtura.methods.attentions import Attention
from mixtura.modeling.attention import attend
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.forming import passes_of, run_layer
from mixtura.modeling.parts import Block, bank_of, tags_of
from mixtura.modeling.tokens import Tokens
from mixtura.types import RouterInput, Routing


@final
class DenseMLP(nn.Module):
    """The gated feed-forward part of a dense layer."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.up_proj = nn.Linear(d_model, width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """The layer's output for every token."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


@final
class MixturaDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts or a dense feed-forward part, each on normed tokens beside a residual.

    With ``parallel`` in the config both read the tokens as they come into the layer.

    Raises:
        UserError: a router reads who attends to whom, which the attention does not say.
    """

    def __init__(self, config: MixturaConfig, attention: Attention, block: Block | None) -> None:
        super().__init__()
        self.config = config
        self.self_attn = attention
        self.mlp = DenseMLP(config.hidden_size, config.intermediate_size) if block is None else block
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.reads_attention = "reads:attention" in tags_of(block)
        if self.reads_attention and "gives_weights" not in declared_tags(type(attention)):
            raise UserError(
                f"{names_of(block)} reads who attends to whom, which {type(attention).__name__} does not "
                "say; choose the attention grouped_query or another router"
            )

    def forward(
        self,
        x: Float[Tensor, "B Q D"],
        *,
        tokens: Tokens,
        common: Mapping[str, Any],
        told: Sequence[Mapping[str, Any]],
        noise_seed: int | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B Q D"], tuple[Routing, ...], Routing | None]:
        """The tokens after this layer, the routing of each of its passes, and that of its attention's heads.

        ``common`` is what its passes are told alike beside the tokens, ``told`` what each is. ``noise_seed``
        makes the generator here, so that recomputing the layer draws the same noise. A dense layer has no
        passes, and most attentions have no routing.
        """
        generator = None if noise_seed is None else torch.Generator().manual_seed(noise_seed)
        normed = self.input_layernorm(x)
        attended, weights, heads = attend(self.self_attn, self.config, normed, tokens, generator, kwargs)
        after = x + attended
        read = x if self.config.parallel else after
        normed = self.post_attention_layernorm(read)
        if isinstance(self.mlp, DenseMLP):
            return after + self.mlp(normed), (), heads
        inputs = RouterInput(
            x=normed.flatten(0, 1),
            valid=tokens.valid,
            training=self.training,
            decoding=tokens.decoding,
            generator=generator,
            sequence_ids=tokens.sequence_ids,
            positions=tokens.positions,
            token_ids=tokens.token_ids,
            labels=tokens.labels,
            attention=None if weights is None or not self.reads_attention else tokens.attention(weights),
            **common,
        )
        output, routings = run_layer(self.mlp, inputs, read.flatten(0, 1), told)
        return after + output.view_as(x), routings, heads


def names_of(layer: object) -> str:
    """What decides and what computes in a layer, in words."""
    one = passes_of(layer)[0]
    return f"{type(one.router).__name__} with the experts {type(bank_of(one)).__name__}"
