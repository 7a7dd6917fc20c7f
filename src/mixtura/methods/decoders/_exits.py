"""Drafts of next tokens, and small predictors of whether a layer has decided for one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.methods.decoders import Probe, Sample

_WIDTH = 32


def successors_of(
    probe: Probe, samples: Sequence[Sample], vocabulary: int, number: int
) -> Int[Tensor, "V m"]:
    """For each token, those that the model says most often after it; then those it says most often."""
    after: dict[int, Counter[int]] = {}
    often: Counter[int] = Counter(dict.fromkeys(range(number), 0))
    for one in samples:
        said = probe.run(one.token_ids).logits.argmax(-1).tolist()
        for token, following in zip(one.token_ids, said, strict=True):
            after.setdefault(token, Counter())[following] += 1
            often[following] += 1
    usual = [token for token, _ in often.most_common()]
    found = torch.tensor(usual[:number], dtype=torch.int32).repeat(vocabulary, 1)
    for token, counts in after.items():
        own = [one for one, _ in counts.most_common(number)]
        filled = own + [one for one in usual if one not in own]
        found[token] = torch.tensor(filled[:number], dtype=torch.int32)
    return found


def features(logits: Float[Tensor, "T m"], before: Float[Tensor, "T m"]) -> Float[Tensor, "T _"]:
    """Logits of drafts, their shares, and how these changed: from 0 where no layer was tested before."""
    shares = logits.softmax(-1)
    return torch.cat([logits, shares, shares - before], dim=-1)


def predict(weights: Mapping[str, Tensor], layer: int, rows: Float[Tensor, "T _"]) -> Float[Tensor, " T"]:
    """How sure a layer's predictor is that the model may be left there."""
    hidden = F.relu(rows @ weights["first"][layer] + weights["first_bias"][layer])
    return (hidden @ weights["second"][layer] + weights["second_bias"][layer]).sigmoid()


def trained_predictor(
    rows: Float[Tensor, "T _"], right: Bool[Tensor, " T"], steps: int = 300
) -> dict[str, Tensor]:
    """A predictor of one layer: one hidden layer, trained on all rows at once."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, rows.shape[1], _WIDTH, generator=generator) / rows.shape[1] ** 0.5
    second = torch.randn(1, _WIDTH, generator=generator) / _WIDTH**0.5
    made = {"first": first, "first_bias": torch.zeros(1, _WIDTH), "second": second}
    made["second_bias"] = torch.zeros(1)
    with torch.enable_grad():
        for one in made.values():
            one.requires_grad_()
        optimizer = torch.optim.Adam(made.values(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            F.binary_cross_entropy(predict(made, 0, rows.detach().float()), right.float()).backward()
            optimizer.step()
    return {name: one.detach()[0] for name, one in made.items()}
