"""LoRA experts that are asked several times, a recurrent router in between."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits, full_precision
from mixtura.methods.adapters._shared import LoraExperts, lora_gate, low_rank, site_seed, top_shares
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": 65,
    "title": "GRAPHMOE: Amplifying Cognitive Depth of Mixture-of-Experts Network via Introducing "
    "Self-Rethinking Mechanism",
    "tags": ["changes:linear"],
}


@final
class GraphMoe(LoraExperts):
    """Fine-tune LoRA experts that think again: several rounds of routing that pass on what was made.

    In each round the best experts of a token are asked and a virtual node gathers what they make; a recurrent
    router (GRU) remembers it, and the next round asks of the token and that memory. What is added is the mean
    of the rounds. It cannot be merged, because tokens decide.

    Args:
        rank: of each LoRA expert.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer.
        top_k: experts that a token gets in a round, by their softmax over its sum.
        rounds: how often the experts are asked.
        hidden: H, features of the memory.
        balance: coefficient of the loss that keeps them in use, as Switch has it, the mean of the rounds'.
        seed: of what the parameters start as.

    Shapes:
        Parameters ``a [M, R, cols]``, ``b [M, rows, R]`` and ``gate [M, cols]``; for more than one round also
        ``gate_memory [M, H]``, ``told [cols, H]``, ``w [3 H, rows]`` and ``u [3 H, H]``.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.

    Example:
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=0, num_layers=4, matrices=shapes)
        >>> GraphMoe(site, rank=2).change(RouterInput.of(torch.eye(4))).extra.abs().sum().item()
        0.0

    Differences from the paper:
        Written from the abstract and public summaries. Experts are the LoRAs beside one linear layer, not
        feed-forward parts. Three rounds; what the memory says is added to the token, by a matrix that starts
        as zeros; the GRU has no biases.

    Reference:
        GRAPHMOE (paper 65, abstract).
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
        rounds: int = 3,
        hidden: int = 16,
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
        self.rounds = self.within("rounds", rounds, 1, 64)
        self.hidden = self.within("hidden", hidden, 1, 1 << 16)
        self.gate = lora_gate(self)
        if rounds > 1:
            shape = site.matrices["weight"]
            self.gate_memory = drawn(site_seed(site, seed, "gate memory"), num_experts, hidden)
            self.told = nn.Parameter(torch.zeros(shape.cols, hidden))
            self.w = drawn(site_seed(site, seed, "w"), 3 * hidden, shape.rows)
            self.u = drawn(site_seed(site, seed, "u"), 3 * hidden, hidden)

    @full_precision()
    def change(self, inputs: RouterInput) -> Change:
        x, part = exact(inputs.x), low_rank(self.a, self.b, self.alpha, [self.rank] * self.num_experts)
        thin, wide = part.a.to(x), part.b.to(x) * part.scale.to(x)[:, None, None]
        total = x.new_zeros(x.shape[0], wide.shape[1])
        memory = x.new_zeros(x.shape[0], self.hidden)
        losses: list[Tensor] = []
        for turn in range(self.rounds):
            logits = exact_logits(x, self.gate)
            if turn:
                logits = logits + exact_logits(memory, self.gate_memory)
            scores = logits.softmax(-1)
            shares = top_shares(scores, self.top_k)
            seen = nn.functional.dropout(x, self.dropout, inputs.training)
            made = torch.einsum("tm,tc,mrc,mor->to", shares, seen, thin, wide)
            losses += self.balanced(inputs, scores, shares).values()
            total = total + made
            if turn + 1 < self.rounds:
                memory = self.remembered(made, memory)
                x = x + exact_logits(memory, self.told)
        found = {"balance": torch.stack(losses).mean()} if losses else {}
        return Change(matrices={}, extra=total / self.rounds, losses=found)

    def remembered(self, made: Tensor, memory: Tensor) -> Tensor:
        """The memory after a round: a GRU's step from what the experts made."""
        given, own = exact_logits(made, self.w).chunk(3, -1), exact_logits(memory, self.u).chunk(3, -1)
        reset, keep = (given[0] + own[0]).sigmoid(), (given[1] + own[1]).sigmoid()
        return keep * memory + (1 - keep) * (given[2] + reset * own[2]).tanh()
