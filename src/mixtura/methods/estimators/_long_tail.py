"""Losses for classes of which some are rare: margins, temperatures and weights by how frequent each is."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators._networks import Passed, dense_routing, everyone

# Of cosine classifiers: what unit vectors' products are multiplied by.
SCALE = 30.0
_MOST_MARGIN = 0.5
_BETA = 0.9999


def margins(counts: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """LDAM's margins: half for the rarest class, falling as the fourth root of the number of rows."""
    falling = counts.clamp(min=1) ** -0.25
    return _MOST_MARGIN * falling / falling.max()


def temperatures(counts: Float[Tensor, " C"], share: float = 0.05) -> Float[Tensor, " C"]:
    """A temperature a class, lower for rarer ones; the most frequent has 1."""
    raw = share * len(counts) * counts / counts.sum() + 1 - share
    return raw / raw.max()


def effective_weights(counts: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """One over the effective number of rows of each class; their mean is 1."""
    raw = (1 - _BETA) / (1 - _BETA ** counts.clamp(min=1).double())
    return (raw / raw.sum() * len(counts)).to(counts.dtype)


def with_margin(
    logits: Float[Tensor, "T C"], target: Int[Tensor, " T"], margin: Float[Tensor, " C"]
) -> Float[Tensor, "T C"]:
    """Logits whose own class is lowered by its margin."""
    return logits - SCALE * F.one_hot(target, len(margin)) * margin


def diversity(
    logits: Float[Tensor, "T C"], mean: Float[Tensor, "T C"], temperature: Float[Tensor, " C"]
) -> Float[Tensor, ""]:
    """How far one expert's distribution is from all experts' mean, which has no gradient."""
    own = (logits / temperature).log_softmax(-1)
    common = (mean.detach() / temperature).softmax(-1)
    scale = temperature.mean() ** 2
    return scale * F.kl_div(own, common, reduction="batchmean")


def counts_of(target: Int[Tensor, " T"], num_classes: int) -> Float[Tensor, " C"]:
    """Rows of each class."""
    return torch.bincount(target, minlength=num_classes).float()


@final
class CosineExpert(nn.Module):
    """A perceptron whose logits are cosines between its hidden features and each class, scaled."""

    def __init__(self, d_hidden: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_hidden, d_hidden)
        self.weight = nn.Parameter(torch.randn(num_classes, d_hidden))

    def forward(self, h: Float[Tensor, "T D"]) -> Float[Tensor, "T C"]:
        """The logits of rows of features."""
        made = F.normalize(self.hidden(h).relu(), dim=-1)
        cosines: Tensor = made @ F.normalize(self.weight, dim=-1).T
        return SCALE * cosines


@final
class NextGate(nn.Module):
    """Whether the next expert is needed: a logit from the best mean logits so far and the features."""

    def __init__(self, d_hidden: int, num_classes: int, num_best: int = 5) -> None:
        super().__init__()
        self.num_best = min(num_best, num_classes)
        self.features = nn.Linear(d_hidden, 16)
        self.head = nn.Linear(16 + self.num_best, 1)

    def forward(self, mean: Float[Tensor, "T C"], h: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
        """The logit of each row."""
        best = mean.topk(self.num_best, dim=-1).values
        known = self.features(F.normalize(h, dim=-1)).relu()
        logits: Tensor = self.head(torch.cat([best, known], dim=-1))
        return logits[:, 0]


@final
class Cascade(nn.Module):
    """Features, experts and the gates between them; trained all run, else each as far as its gates say."""

    def __init__(self, features: nn.Module, d_hidden: int, num_classes: int, num_experts: int) -> None:
        super().__init__()
        self.features = features
        self.experts = nn.ModuleList(CosineExpert(d_hidden, num_classes) for _ in range(num_experts))
        self.gates = nn.ModuleList(NextGate(d_hidden, num_classes) for _ in range(num_experts - 1))
        self.counts: Tensor
        self.register_buffer("counts", torch.ones(num_classes))
        self.threshold = 0.5

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        """The mean of the experts that ran."""
        h = self.features(x)
        if self.training:
            outputs = everyone(self.experts, h)
            equal = x.new_full((len(x), len(outputs)), 1 / len(outputs))
            mean = outputs.mean(0)
            return Passed(output=mean, routing=dense_routing(equal), outputs=outputs, more=self.counts)
        total = x.new_zeros(len(x), len(self.counts))
        going = torch.arange(len(x))
        present = torch.zeros(len(x), len(self.experts), dtype=torch.bool)
        for place, expert in enumerate(self.experts):
            present[going, place] = True
            total[going] = total[going] + expert(h[going])
            if place < len(self.gates):
                logits = self.gates[place](total[going] / (place + 1), h[going])
                going = going[logits.sigmoid() > self.threshold]
        ran = present.sum(1, keepdim=True)
        weights = present / ran.to(x)
        return Passed(output=total / ran, routing=dense_routing(weights, present=present), more=self.counts)
