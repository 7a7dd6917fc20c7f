"""LoRA modules of a layer as its experts, chosen once by the prompt."""

from __future__ import annotations

from typing import final

from mixtura.errors import UserError
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods.adapters._prompts import Joined, prompt_means
from mixtura.methods.adapters._shared import (
    balance_loss,
    low_rank,
    site_seed,
    smallest_side,
    thin_pair,
    top_shares,
)
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": 52,
    "title": "MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning",
    "tags": ["changes:linear", "shares:layer", "per_prompt", "looks_ahead"],
}


@final
class MiLora(Joined):
    """Fine-tune one LoRA beside each linear layer; the prompt decides once which of a layer's are used.

    The LoRAs of query, key, value and so on are the experts of their decoder layer. A router there reads the
    prompt before the first new token, and what it decides is kept for all that follow, which makes generation
    fast. It cannot be merged, because prompts decide.

    Args:
        rank: of each LoRA. alpha: what they learn is scaled by it over the rank. dropout: share of features
        that the thin matrices do not see in training. top_k: LoRAs of each decoder layer that a prompt uses,
        weighted by their softmax over its mean, at most. balance: coefficient of the loss that keeps all in
        use, as Switch has it. seed: of what ``a`` and the router start as.

    Shapes:
        Parameters ``a [1, R, cols]`` and ``b [1, rows, R]``; at a decoder layer's first site ``gate [P, D]``,
        one row for each of its P sites.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.
        UserError: a site runs before the first of its decoder layer.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape
        >>> shapes, peers = {"weight": MatrixShape(6, 4)}, ("q", "k", "v", "o")
        >>> site = Site(name="q", kind="linear", layer=0, num_layers=1, matrices=shapes, peers=peers)
        >>> made = MiLora(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, made.state.shape, (made.state > 0).sum(-1).tolist()
        (torch.Size([4, 1]), torch.Size([4, 4]), [3, 3, 3, 3])

    Differences from the paper:
        Written from the abstract. How the prompt is pooled (its mean at the layer's first site), the weights
        (a LoRA's softmax over the mean of the chosen, so that even ones count in full), their number and the
        loss that keeps them in use are choices.

    Reference:
        MiLoRA: Efficient Mixture of Low-Rank Adaptation (paper 52, abstract).
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        top_k: int = 3,
        balance: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(site)
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.top_k = self.within("top_k", top_k, 1, 1024)
        self.balance = self.within("balance", balance, 0, 1e6)
        self.seed = seed
        self.a, self.b = thin_pair(site, "weight", [rank], seed)
        if site.place == 0:
            cols = site.matrices["weight"].cols
            self.gate = drawn(site_seed(site, seed, "gate"), max(len(site.peers), 1), cols)

    def change(self, inputs: RouterInput) -> Change:
        made, losses, history = inputs.state, {}, {}
        if self.site.place == 0:
            means = prompt_means(inputs, exact(inputs.x))
            scores = exact_logits(means, self.gate).softmax(-1)[inputs.sequences]
            few = min(self.top_k, scores.shape[1])
            made, history = few * top_shares(scores, few), {"prompt": means}
            if self.balance and inputs.training:
                # The mean over all sites is taken of it, and one site of a layer has it.
                losses["balance"] = self.balance * scores.shape[1] * balance_loss(scores, made, inputs.valid)
        if made is None:
            raise UserError(
                f"{self.site.name} runs before {self.site.peers[0]}, which decides for their layer; target "
                "layers that run in the order in which the model has them"
            )
        place = self.site.place
        part = low_rank(self.a, self.b, self.alpha, [self.rank])
        return Change(
            matrices={"weight": part},
            shares=made[:, place : place + 1],
            state=made,
            history=history,
            losses=losses,
        )
