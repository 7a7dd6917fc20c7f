"""What tests of LoRA experts give them, and the plain words for what these make of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from methods.adapters.adapter_sites import linear_site
from torch import Tensor

from mixtura.adapting.changing import add_to_rows
from mixtura.methods import load_method
from mixtura.types import Change, LowRank, RouterInput, Site

X = torch.randn(7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SEQUENCES = torch.tensor([0, 0, 0, 0, 1, 1, 1])
VALID = torch.tensor([True, True, True, True, False, True, True])
PROMPT = torch.tensor([1, 1, 0, 0, 1, 1, 0])


def stirred(method: str, site: Site | None = None, **settings: Any) -> Any:
    """An adapter whose parameters all matter."""
    adapter = load_method("adapters", method)(site or linear_site(2), **settings).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.4)
    return adapter


def given(**more: Any) -> RouterInput:
    """Two sequences, of which the second begins with padding, and the tokens of their prompts."""
    return RouterInput.of(X, valid=VALID, sequence_ids=SEQUENCES, labels={"prompt": PROMPT}, **more)


def prompt_means(values: Tensor) -> list[Tensor]:
    """Each sequence's mean over its prompt."""
    found = []
    for sequence in range(2):
        rows = [values[t] for t in range(7) if SEQUENCES[t] == sequence and VALID[t] and PROMPT[t]]
        found.append(sum(rows) / len(rows))
    return found


def added(change: Change, x: Tensor = X) -> Tensor:
    """What a change adds to zeros."""
    return add_to_rows(torch.zeros(len(x), 20, dtype=torch.float64), x, change, None).detach()


def softmax(values: list[float]) -> list[float]:
    """Probabilities."""
    powers = [math.exp(one - max(values)) for one in values]
    return [one / sum(powers) for one in powers]


def best(scores: list[float], top_k: int) -> list[float]:
    """The highest scores over their sum."""
    order = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
    whole = sum(scores[e] for e in order)
    return [score / whole if e in order else 0.0 for e, score in enumerate(scores)]


def by_shares(made: Any, shares: list[list[float]], scale: float) -> Tensor:
    """What each token's shares of the experts add."""
    rows = []
    for x, own in zip(X, shares, strict=True):
        rows.append(sum(s * scale * (b @ (a @ x)) for s, a, b in zip(own, made.a, made.b, strict=True)))
    return torch.stack(rows).detach()


def loras(ranks: list[int]) -> list[dict[str, LowRank]]:
    """A library of LoRAs of one layer."""
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "weight": LowRank(
                torch.randn(1, rank, 16, generator=generator),
                torch.randn(1, 20, rank, generator=generator),
                torch.tensor([0.5 + rank]),
            )
        }
        for rank in ranks
    ]
