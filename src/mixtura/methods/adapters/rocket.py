"""LoRA experts that begin as the LoRAs of a library, chosen by a few examples."""

from __future__ import annotations

from typing import final

from mixtura.methods._precision import exact_logits
from mixtura.methods.adapters._shared import LoraExperts, lora_gate, top_shares
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": 9,
    "title": "Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models",
    "tags": ["changes:linear", "takes_library"],
}


@final
class Rocket(LoraExperts):
    """Fine-tune a mixture of LoRAs that others trained, of which a router gives each token the best two.

    The LoRAs are PEFT's own (`mixtura.adapting.start_from`, or ``library=[...]`` of `mixtura tune`); without
    any the experts begin as nothing. It cannot be merged, because tokens decide.

    Args:
        rank: of each LoRA expert, at least that of the library's.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer.
        top_k: experts that a token gets, by their softmax over its sum.
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
        >>> made = Rocket(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, (made.shares > 0).sum(-1).tolist()
        (torch.Size([4, 4]), [2, 2, 2, 2])

    Differences from the paper:
        What a LoRA learned is scaled by its own alpha over its rank, which the released code leaves out once
        LoRAs are experts. Which LoRAs of a library suit a task is the user's choice: there, a few examples of
        it choose those that make the examples likely, and among these a group that is diverse; and
        instructions that resemble the examples are gathered. Rank 8 and no dropout, where its code has 16 and
        0.05.

    Reference:
        Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models (paper 9); its code,
        Yaphabates/Rocket.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        num_experts: int = 4,
        top_k: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(
            site,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            num_experts=num_experts,
            balance=0.0,
            seed=seed,
        )
        self.top_k = self.within("top_k", top_k, 1, num_experts)
        self.gate = lora_gate(self)

    def change(self, inputs: RouterInput) -> Change:
        scores = exact_logits(inputs.x, self.gate).softmax(-1)
        return self.mixed(top_shares(scores, self.top_k), {})
