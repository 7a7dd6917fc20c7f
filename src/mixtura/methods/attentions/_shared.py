"""Mathematics that attentions share: rotary positions and the heads of ordinary attention."""

from __future__ import annotations

from abc import ABC
from typing import Literal

from jaxtyping import Float
from torch import Generator, Tensor, cat, nn, zeros

from mixtura.methods._drawing import generator_of, normal
from mixtura.methods._norms import RMSNorm
from mixtura.methods.attentions import Attention
from mixtura.types.attending import AttentionInput, AttentionShape

QueryKeyNorm = Literal["none", "head", "full"]


def rotated(
    x: Float[Tensor, "B H Q W"], cos: Float[Tensor, "_ #H Q W"], sin: Float[Tensor, "_ #H Q W"]
) -> Float[Tensor, "B H Q W"]:
    """Queries or keys turned by their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + cat((-second, first), dim=-1) * sin


def projection(generator: Generator, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """A linear layer drawn from a generator, with a variance of one over its inputs and no bias at first."""
    made = nn.Linear(inputs, outputs, bias=bias, device="meta")
    made.weight = nn.Parameter(normal(generator, outputs, inputs) / inputs**0.5)
    if bias:
        made.bias = nn.Parameter(zeros(outputs))
    return made


def heads_of(
    x: Float[Tensor, "B Q D"], linear: nn.Module, norm: RMSNorm | None, width: int
) -> Float[Tensor, "B H Q W"]:
    """A projection of tokens, normed over its full width or over each head's, by the norm's own."""
    features: Tensor = linear(x)
    full = norm is not None and norm.weight.numel() != width
    if norm is not None and full:
        features = norm(features)
    heads: Tensor = features.unflatten(-1, (features.shape[-1] // width, width))
    if norm is not None and not full:
        heads = norm(heads)
    return heads.transpose(1, 2)


class OrdinaryHeads(Attention, ABC):
    """Attention with some heads in which every token sees all before it, or the last so many.

    ``heads`` are the sizes of these; None where there are none.
    """

    def __init__(
        self,
        shape: AttentionShape,
        heads: AttentionShape | None,
        *,
        bias: bool,
        norm: QueryKeyNorm,
        eps: float,
        seed: int,
    ) -> None:
        super().__init__(shape)
        self.bias, self.query_key_norm, self.eps = bias, norm, self.within("eps", eps, 0.0, 1.0)
        self.seed = seed
        if heads is None:
            return
        queries, keys = heads.num_heads * heads.d_head, heads.num_key_value_heads * heads.d_head
        self.num_key_value_groups = heads.num_groups
        generator = generator_of(seed)
        self.q_proj = projection(generator, heads.d_model, queries, bias=bias)
        self.k_proj = projection(generator, heads.d_model, keys, bias=bias)
        self.v_proj = projection(generator, heads.d_model, keys, bias=bias)
        self.o_proj = projection(generator, queries, heads.d_model, bias=bias)
        widths = {"none": None, "head": (heads.d_head,) * 2, "full": (queries, keys)}[norm]
        self.q_norm = RMSNorm(widths[0], eps) if widths else None
        self.k_norm = RMSNorm(widths[1], eps) if widths else None

    def _heads(self, x: Tensor, linear: nn.Module, norm: RMSNorm | None) -> Float[Tensor, "B H Q W"]:
        return heads_of(x, linear, norm, self.shape.d_head)

    def ordinary(
        self, inputs: AttentionInput
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B H Q C"] | None]:
        """What these heads gather, as one, and their weights where the implementation gives them."""
        gathered, weights = self.gathered(inputs)
        return self.o_proj(gathered.flatten(2).contiguous()), weights

    def gathered(
        self, inputs: AttentionInput
    ) -> tuple[Float[Tensor, "B Q H W"], Float[Tensor, "B H Q C"] | None]:
        """What each head gathers, and their weights where the implementation gives them."""
        x, cos, sin = inputs.x, inputs.cos.unsqueeze(1), inputs.sin.unsqueeze(1)
        query = rotated(self._heads(x, self.q_proj, self.q_norm), cos, sin)
        key = rotated(self._heads(x, self.k_proj, self.k_norm), cos, sin)
        return inputs.attend(query, key, self._heads(x, self.v_proj, None))
