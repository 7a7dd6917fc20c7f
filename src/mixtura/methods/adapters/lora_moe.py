"""LoRA experts of which every token gets all, by a softmax."""

from __future__ import annotations

from typing import final

from mixtura.methods._precision import exact_logits
from mixtura.methods.adapters._shared import LoraExperts, lora_gate
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": None,
    "title": "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin",
    "tags": ["changes:linear"],
}


@final
class LoraMoe(LoraExperts):
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
        are. Its code divides the variance by the squared mean, and leaves the balance off by default. Its
        script has 8 experts. All linear layers have experts, not the feed-forward ones alone; name others by
        ``target_modules``. All experts see the same features where there is dropout.

    Reference:
        LoRAMoE (no paper of the list); its code, Ablustrund/LoRAMoE, ``peft/tuners/lora.py`` and
        ``run_loramoe.sh``; template of TUDB-Labs/MoE-PEFT at 40f8cb7 for M.
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
        super().__init__(
            site,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            num_experts=num_experts,
            balance=balance,
            seed=seed,
        )
        self.gate = lora_gate(self)

    def change(self, inputs: RouterInput) -> Change:
        shares = exact_logits(inputs.x, self.gate).softmax(-1)
        losses = {}
        if self.balance and inputs.training:
            importance = shares[inputs.valid].sum(0)
            spread = importance.var(correction=0) / importance.mean().clamp(min=1e-9)
            losses["balance"] = self.balance * spread / max(int(inputs.valid.sum()), 1)
        return self.mixed(shares, losses)
