"""LoRA experts, as many as a token's uncertainty asks for."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import crowding, mean_of_valid
from mixtura.methods.adapters._shared import LoraExperts, lora_gate
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": 46,
    "title": "DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism",
    "tags": ["changes:linear"],
}


@final
class DynMole(LoraExperts):
    """Fine-tune LoRA experts beside each linear layer: few where the router is sure, all where it is not.

    A token gets the likeliest experts while their probabilities sum to ``top_p`` at most, ``least`` at
    least; where the Tsallis entropy of the router is near its greatest, all of them. Shares are the
    probabilities themselves. It cannot be merged, because tokens decide.

    Args:
        rank: of each LoRA expert.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer.
        top_p: what the chosen experts' probabilities sum to at most.
        least: experts that a token gets at least.
        threshold: of the entropy over its greatest, above which a token gets all experts.
        q: of the Tsallis entropy; near 1 it is Shannon's.
        uncertainty: coefficient of the mean of that entropy, which is lowered.
        balance: coefficient of the loss that keeps experts in use.
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
        >>> made = DynMole(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, made.shares.sum(-1).max() <= 1 + 1e-6
        (torch.Size([4, 8]), tensor(True))

    Differences from the paper:
        As its code has it: the expert that crosses ``top_p`` is left out, shares are not divided by their
        sum, and the balance is of kept and of all probabilities, not of counts. Padding counts in neither
        loss, where its code takes the entropy of padding, too.

    Reference:
        DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism (paper 46);
        its code, mikecovlee/DynMoLE.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        num_experts: int = 8,
        top_p: float = 0.75,
        least: int = 2,
        threshold: float = 0.9,
        q: float = 1.1,
        uncertainty: float = 0.01,
        balance: float = 0.001,
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
            least_experts=2,
        )
        self.top_p = self.within("top_p", top_p, 0, 1)
        self.least = self.within("least", least, 1, num_experts)
        self.threshold = self.within("threshold", threshold, 0, 2)
        self.q = self.within("q", q, 1.001, 10)
        self.uncertainty = self.within("uncertainty", uncertainty, 0, 1e6)
        self.gate = lora_gate(self)

    def change(self, inputs: RouterInput) -> Change:
        scores = exact_logits(inputs.x, self.gate).softmax(-1)
        unsure = self.entropy(scores)
        ordered = torch.sort(scores, dim=-1, descending=True, stable=True)
        kept = ordered.values.cumsum(-1) <= self.top_p
        kept[:, : self.least] = True
        kept |= (unsure > self.threshold)[:, None]
        chosen = torch.zeros_like(kept).scatter(-1, ordered.indices, kept)
        shares = scores * chosen
        losses = {}
        if self.uncertainty and inputs.training:
            losses["entropy"] = self.uncertainty * mean_of_valid(unsure, inputs.valid)
        if self.balance and inputs.training:
            means = (mean_of_valid(one, inputs.valid) for one in (shares, scores))
            losses["balance"] = self.balance * crowding(*means)
        return self.mixed(shares, losses)

    def entropy(self, scores: Float[Tensor, "T M"]) -> Float[Tensor, " T"]:
        """Tsallis entropy of each token's scores, over the greatest there is: 1 where all are alike."""
        found = (1 - (scores + 1e-5).pow(self.q).sum(-1)) / (self.q - 1)
        greatest: float = (1 - float(self.num_experts) ** (1 - self.q)) / (self.q - 1)
        return found / greatest
