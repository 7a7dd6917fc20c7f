"""Steps of gradient that are themselves learned through, and what they step towards."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mixtura.methods.estimators._domains import parted
from mixtura.methods.estimators._networks import Passed, dense_routing, everyone, perceptron


def stepped(
    module: nn.Module, x: Float[Tensor, "T D"], wanted: Float[Tensor, "T F"], step: float
) -> Callable[[Tensor], Tensor]:
    """A module after one step down the squared error to what is wanted, through which gradients go."""
    before: dict[str, Tensor] = dict(module.named_parameters())
    loss = F.mse_loss(functional_call(module, before, (x,)), wanted)
    slopes = torch.autograd.grad(loss, tuple(before.values()), create_graph=True)
    after = {name: one - step * slope for (name, one), slope in zip(before.items(), slopes, strict=True)}
    return lambda rows: functional_call(module, after, (rows,))


@final
class Aggregator(nn.Module):
    """One layer of a transformer over the features that experts have of a row; the mean over experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 4 if width % 4 == 0 else 1, batch_first=True)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(
        self, tokens: Float[Tensor, "T E F"], left_out: Int[Tensor, " T"] | None
    ) -> tuple[Float[Tensor, "T F"], Float[Tensor, "T E"]]:
        """The feature of each row, and how far each expert was attended to; one may be left out."""
        num = tokens.shape[1]
        hidden = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        # Of one expert alone nothing would be left.
        if left_out is not None and num > 1:
            hidden = F.one_hot(left_out, num).bool()
        seen = self.norms[0](tokens)
        made, shares = self.attention(seen, seen, seen, key_padding_mask=hidden)
        h = tokens + made
        h = h + self.inner(self.norms[1](h))
        kept = (~hidden).to(h.dtype)
        weights = kept / kept.sum(1, keepdim=True)
        return torch.einsum("te,tef->tf", weights, h), torch.einsum("tq,tqe->te", weights, shares)


@final
class Student(nn.Module):
    """A small network with the experts and the aggregator that teach it."""

    def __init__(self, d_in: int, d_out: int, width: int, num_domains: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(perceptron(d_in, width, width) for _ in range(num_domains))
        self.expert_heads = nn.ModuleList(nn.Linear(width, d_out) for _ in range(num_domains))
        self.aggregator, self.aggregator_head = Aggregator(width), nn.Linear(width, d_out)
        self.student, self.head = perceptron(d_in, width, width), nn.Linear(width, d_out)

    def told(
        self, x: Float[Tensor, "T D"], left_out: Int[Tensor, " T"] | None
    ) -> tuple[Float[Tensor, "T F"], Float[Tensor, "T E"]]:
        """The features that rows should have, of all experts but one, and how far each was attended to."""
        made: tuple[Tensor, Tensor] = self.aggregator(everyone(self.experts, x).transpose(0, 1), left_out)
        return made

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        """What the student says of rows as it is, and how far each expert was attended to."""
        rows, _ = parted(x)
        _, shares = self.told(rows, None)
        return Passed(output=self.head(self.student(rows)), routing=dense_routing(shares))
