"""Mixture of attention experts: several whole attentions, mixed by each token's own shares of them (BAM)."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.errors import UnknownNameError
from mixtura.methods._drawing import drawn, generator_of
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods.attentions import Attended, Attention
from mixtura.methods.attentions._projections import Projections
from mixtura.methods.attentions._shared import QueryKeyNorm, heads_of, rotated
from mixtura.types.attending import AttentionInput, AttentionShape

METHOD = {
    "paper": 164,
    "title": "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
}
Keys = Literal["own", "shared"]


@final
class AttentionExperts(Attention):
    """Let every token attend in E whole attentions and mix what they gather, weighted by a softmax router.

    Each expert has queries and an output of its own and, with ``keys="own"``, keys and values; with
    ``keys="shared"`` all experts read one set of keys and values, so that the cache is no larger than
    ordinary attention's. Every token is in every expert (a soft mixture), so nothing has to be balanced
    and no token is dropped. Experts that are all alike are ordinary attention, whatever the router does.

    Shapes:
        ``x [B, Q, D]`` to ``[B, Q, D]``; a gate ``[E, D]``, and by expert the projections of grouped-query
        attention. The cache holds E times its keys and values, or as many with ``keys="shared"``.

    Raises:
        SettingError: ``num_experts`` is not in [1, 1024], or ``window`` is below 1.
        UnknownNameError: there are no such ``keys``.

    Example:
        >>> from mixtura.modeling.family import MixturaConfig, MixturaModel
        >>> attention = {"name": "attention_experts", "num_experts": 3, "keys": "shared"}
        >>> model = MixturaModel(MixturaConfig(hidden_size=32, num_hidden_layers=1, attention=attention))
        >>> [tuple(one.q_proj.weight.shape) for one in model.layers[0].self_attn.members]
        [(32, 32), (32, 32), (32, 32)]

    Differences from the paper:
        Only the abstract and a public review were at hand. That the router is one matrix without a bias, on
        the same normed tokens as the attention, is ours. The authors' parallel layers are ``parallel`` of the
        model. There is no loss for the router, as every expert is always on.

    Reference:
        BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts (paper 164,
        abstract and a review).
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        num_experts: int = 4,
        keys: Keys = "own",
        window: int | None = None,
        bias: bool = False,
        query_key_norm: QueryKeyNorm = "none",
        eps: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        if keys not in ("own", "shared"):
            raise UnknownNameError("keys of AttentionExperts", keys, ("own", "shared"))
        self.num_experts = self.within("num_experts", num_experts, 1, 1024)
        self.window = None if window is None else self.within("window", window, 1, 1 << 40)
        self.keys, self.bias, self.query_key_norm = keys, bias, query_key_norm
        self.eps, self.seed = self.within("eps", eps, 0.0, 1.0), seed
        queries, width = shape.num_heads * shape.d_head, shape.num_key_value_heads * shape.d_head
        norms = {"none": None, "head": (shape.d_head,) * 2, "full": (queries, width)}[query_key_norm]
        generator, sizes = generator_of(seed), (shape.d_model, queries, width)
        self.members = nn.ModuleList(Projections(sizes, norms, eps) for _ in range(num_experts))
        for member in self.members:
            assert isinstance(member, Projections)
            member.draw(generator, queries=True, keys=keys == "own", bias=bias)
        self.common = Projections(sizes, norms, eps) if keys == "shared" else None
        if self.common is not None:
            self.common.draw(generator, queries=False, keys=True, bias=bias)
            self.num_key_value_groups = num_experts * shape.num_groups
        self.gate = drawn(seed + 1, num_experts, shape.d_model, scale=1 / 3)

    def forward(self, inputs: AttentionInput) -> Attended:
        x, width = inputs.x, self.shape.d_head
        cos, sin = inputs.cos.unsqueeze(1), inputs.sin.unsqueeze(1)
        members = [one for one in self.members if isinstance(one, Projections)]
        readers = members if self.common is None else [self.common]
        query = torch.stack([heads_of(x, one.q_proj, one.q_norm, width) for one in members], 1)
        key = torch.cat([heads_of(x, one.k_proj, one.k_norm, width) for one in readers], 1)
        value = torch.cat([heads_of(x, one.v_proj, None, width) for one in readers], 1)
        query = rotated(self._ordered(query), cos, sin)
        gathered = inputs.attend(query, rotated(key, cos, sin), value)[0]
        by_expert = self._by_expert(gathered)
        shares = exact_logits(x.flatten(0, 1), self.gate).softmax(-1).unflatten(0, x.shape[:2])
        output = torch.zeros_like(x, dtype=exact(x).dtype)
        for number, one in enumerate(members):
            made = one.o_proj(by_expert[:, :, number].flatten(2).contiguous())
            output = output + shares[..., number : number + 1] * exact(made)
        return output.to(x.dtype), None, None

    def _ordered(self, heads: Float[Tensor, "B E H Q W"]) -> Float[Tensor, "B EH Q W"]:
        """Heads in the order in which they share keys: of shared ones all experts' of a group together."""
        if self.common is not None:
            sizes = (self.shape.num_key_value_heads, self.shape.num_groups)
            heads = torch.unflatten(heads, 2, sizes).transpose(1, 2).flatten(2, 3)
        return heads.flatten(1, 2)

    def _by_expert(self, gathered: Float[Tensor, "B Q EH W"]) -> Float[Tensor, "B Q E H W"]:
        """What the heads of each expert gathered."""
        groups, each = self.shape.num_key_value_heads, self.shape.num_groups
        if self.common is None:
            return torch.unflatten(gathered, 2, (self.num_experts, groups * each))
        apart = torch.unflatten(gathered, 2, (groups, self.num_experts, each))
        return apart.transpose(2, 3).flatten(3, 4)
