"""Several experts of one dense feed-forward part, each with LoRAs of its own."""

from __future__ import annotations

from typing import final

from torch import nn

from mixtura.methods._drawing import generator_of, normal
from mixtura.methods._precision import exact_logits
from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._shared import (
    balance_loss,
    low_rank,
    register_pairs,
    site_seed,
    smallest_side,
    top_shares,
)
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": 165,
    "title": "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA based Mixture of Experts",
    "tags": ["changes:blocks", "changes:linear"],
}


@final
class MixLora(Adapter):
    """Fine-tune a dense model into a mixture of experts: LoRAs make M experts of each feed-forward part.

    Each expert is the whole frozen part, its activation inside, with LoRAs of its own beside gate, up and
    down projection; a router gives each token the best few. Linear layers elsewhere, which are those of
    attention, have one LoRA each. It cannot be merged, because tokens decide.

    Args:
        rank: of each LoRA.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, experts of each feed-forward part.
        top_k: experts that a token gets, by their softmax over its sum.
        balance: coefficient of the loss that keeps them in use, as Switch has it.
        seed: of what the parameters start as.

    Shapes:
        Of a feed-forward part ``gate_a [M, R, D]``, ``gate_b [M, F, R]``, the same of ``up``, ``down_a [M, R,
        F]`` and ``down_b [M, D, R]``, and ``router [M, D]``; of a linear layer ``weight_a [1, R, cols]`` and
        ``weight_b [1, rows, R]``.

    Raises:
        SettingError: ``rank`` is not in [1, the smallest side of a matrix], or another is out of range.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"gate": MatrixShape(6, 4), "up": MatrixShape(6, 4), "down": MatrixShape(4, 6)}
        >>> site = Site(name="mlp", kind="block", layer=0, num_layers=4, matrices=shapes)
        >>> made = MixLora(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, (made.shares > 0).sum(-1).tolist()
        (torch.Size([4, 8]), [2, 2, 2, 2])

    Differences from the paper:
        Rank 8 and no dropout, where its code has 16 and 0.05. LoRA alone, none of its variants. Experts share
        one down projection of the base, which is exact because a token's weights sum to 1. The loss is the
        mean over the changed layers.

    Reference:
        MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA based Mixture of Experts (paper 165);
        its code, TUDB-Labs/MixLoRA.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        num_experts: int = 8,
        top_k: int = 2,
        balance: float = 0.001,
        seed: int = 0,
    ) -> None:
        super().__init__(site)
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.num_experts = self.within("num_experts", num_experts, 1, 1024)
        self.top_k = self.within("top_k", top_k, 1, num_experts)
        self.balance = self.within("balance", balance, 0, 1e6)
        self.seed = seed
        self.count = num_experts if site.kind == "block" else 1
        register_pairs(self, site.matrices, [rank] * self.count, seed)
        if site.kind == "block":
            generator = generator_of(site_seed(site, seed, "router"))
            rows = normal(generator, num_experts, site.matrices["gate"].cols)
            self.router = nn.Parameter(0.02 * rows)

    def change(self, inputs: RouterInput) -> Change:
        part, ranks = self.get_parameter, [self.rank] * self.count
        made = {
            name: low_rank(part(f"{name}_a"), part(f"{name}_b"), self.alpha, ranks)
            for name in self.site.matrices
        }
        if self.site.kind != "block":
            return Change(matrices=made)
        scores = exact_logits(inputs.x, self.router).softmax(-1)
        shares = top_shares(scores, self.top_k)
        losses = {}
        if self.balance and inputs.training:
            losses["balance"] = self.balance * balance_loss(scores, shares, inputs.valid)
        return Change(matrices=made, shares=shares, losses=losses)
