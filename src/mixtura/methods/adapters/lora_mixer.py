"""LoRA experts that are trained softly and used by the few."""

from __future__ import annotations

from typing import final

from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import entropy, mean_of_valid
from mixtura.methods.adapters._shared import LoraExperts, lora_gate, top_shares
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": 71,
    "title": "LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing",
    "tags": ["changes:linear"],
}


@final
class LoraMixer(LoraExperts):
    """Fine-tune LoRA experts beside each linear layer: every token trains all of them, and uses the best few.

    In training a token gets every expert by its softmax, so that the router learns of all; afterwards the
    ``top_k`` best over their sum. Two losses keep experts in use and the router sure. It cannot be merged,
    because tokens decide.

    Args:
        rank: of each LoRA expert.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer.
        top_k: experts that a token gets when nothing is trained.
        balance: coefficient of the loss that keeps them in use, as Switch has it.
        sharpness: coefficient of the router's mean entropy in nats, which is lowered.
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
        >>> made = LoraMixer(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, (made.shares > 0).sum(-1).tolist()
        (torch.Size([4, 4]), [3, 3, 3, 3])

    Differences from the paper:
        The paper's loss subtracts the entropy, which its text says is to fall: here it is added. Experts
        are trained together from the start, not first by the label of their task and then held near what
        they were. Its coefficients are not published; both are 0.01.

    Reference:
        LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing (paper 71, abstract);
        README of hustcselwb/LoRA-Mixer.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        num_experts: int = 4,
        top_k: int = 3,
        balance: float = 0.01,
        sharpness: float = 0.01,
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
        self.top_k = self.within("top_k", top_k, 1, num_experts)
        self.sharpness = self.within("sharpness", sharpness, 0, 1e6)
        self.gate = lora_gate(self)

    def change(self, inputs: RouterInput) -> Change:
        scores = exact_logits(inputs.x, self.gate).softmax(-1)
        few = top_shares(scores, self.top_k)
        losses = self.balanced(inputs, scores, few)
        if self.sharpness and inputs.training:
            losses["entropy"] = self.sharpness * mean_of_valid(entropy(scores), inputs.valid)
        return self.mixed(scores if inputs.training else few, losses)
