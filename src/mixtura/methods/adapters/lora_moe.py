"""LoRA experts of which every token gets all, by a softmax."""

from __future__ import annotations

from typing import final

from mixtura.methods._precision import exact_logits
from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._shared import lora_gate, mixed, smallest_side, thin_pair
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": None,
    "title": "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin",
    "tags": ["changes:linear"],
}


@final
class LoraMoe(Adapter):
    """Fine-tune several LoRA experts beside each linear layer, all of which each token gets by a softmax.

    The base's knowledge stays in its frozen weights, and a router per layer shares out what is learned: for
    tuning on much data without forgetting. It cannot be merged, because tokens decide.

    Args:
        rank: of each LoRA expert.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer.
        balance: coefficient of the loss that keeps them in use: the variance of their summed shares over the
            mean, for each token.
        seed: of what ``a`` and the router start as.

    Shapes:
        Parameters ``a [M, R, cols]``, ``b [M, rows, R]`` and ``gate [M, cols]``.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=0, num_layers=4, matrices=shapes)
        >>> made = LoraMoe(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, made.shares.sum(-1).allclose(torch.ones(4))
        (torch.Size([4, 6]), True)

    Differences from the paper:
        The balance has no two groups of experts for two kinds of data, which would need labels of the data.
        It is over the tokens of one layer and pass, for each of which it counts the same however many there
        are. All linear layers have experts, not the feed-forward ones alone; name others by
        ``target_modules``.

    Reference:
        LoRAMoE (no paper of the list); template of TUDB-Labs/MoE-PEFT at 40f8cb7 for M.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 4,
        alpha: float = 32.0,
        dropout: float = 0.05,
        num_experts: int = 6,
        balance: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(site)
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.num_experts = self.within("num_experts", num_experts, 1, 1024)
        self.balance = self.within("balance", balance, 0, 1e6)
        self.seed = seed
        self.a, self.b = thin_pair(site, "weight", [rank] * num_experts, seed)
        self.gate = lora_gate(site, num_experts, seed)

    def change(self, inputs: RouterInput) -> Change:
        shares = exact_logits(inputs.x, self.gate).softmax(-1)
        losses = {}
        if self.balance and inputs.training:
            importance = shares[inputs.valid].sum(0)
            spread = importance.var(correction=0) / importance.mean().clamp(min=1e-9)
            losses["balance"] = self.balance * spread / max(int(inputs.valid.sum()), 1)
        return mixed((self.a, self.b), self.alpha, shares, losses)
