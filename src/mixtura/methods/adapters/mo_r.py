"""LoRA experts chosen by several routers together."""

from __future__ import annotations

from typing import final

from mixtura.methods import create
from mixtura.methods.adapters._shared import LoraExperts, site_seed, to_shares
from mixtura.types import Change, LayerShape, RouterInput, Site

METHOD = {
    "paper": 60,
    "title": "Mixture of Routers",
    "tags": ["changes:linear"],
}


@final
class MoR(LoraExperts):
    """Fine-tune LoRA experts beside each linear layer, chosen by several routers that another one weighs.

    Each sub-router scores the experts, and a main router says for each token how much each sub-router
    counts: the router ``mixture_of_routers``, over LoRA experts. It cannot be merged, because tokens
    decide.

    Args:
        rank: of each LoRA expert.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer.
        top_k: experts that a token gets, by their mixed score over its sum.
        num_routers: sub-routers.
        balance: coefficient of the loss that keeps the experts in use, as Switch has it.
        seed: of what ``a`` and the routers start as.

    Shapes:
        Parameters ``a [M, R, cols]``, ``b [M, rows, R]`` and those of the router.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=0, num_layers=4, matrices=shapes)
        >>> made = MoR(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, (made.shares > 0).sum(-1).tolist()
        (torch.Size([4, 4]), [2, 2, 2, 2])

    Differences from the paper:
        Written from the abstract, which names neither numbers nor a loss. Probabilities of the sub-routers
        are mixed, not their logits.

    Reference:
        Mixture of Routers (paper 60, abstract).
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
        num_routers: int = 3,
        balance: float = 0.01,
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
        self.num_routers = self.within("num_routers", num_routers, 1, 1024)
        shape = LayerShape(site.matrices["weight"].cols, rank, num_experts)
        chosen = {"top_k": top_k, "num_routers": num_routers, "seed": site_seed(site, seed, "router")}
        self.router = create("routers", "mixture_of_routers", shape, **chosen)

    def change(self, inputs: RouterInput) -> Change:
        routing = self.router(inputs)
        shares = to_shares(routing)
        return self.mixed(shares, self.balanced(inputs, routing.scores, shares))
