"""Traces of choices that are given, for tests of analyses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixtura.types import LayerShape
from mixtura.types.trace import LayerTrace, Trace


def trace_of(
    *layers: Tensor,
    num_experts: int,
    lengths: Sequence[int] | None = None,
    domains: Sequence[int] | None = None,
    token_ids: Tensor | None = None,
    logits: Sequence[Tensor] | None = None,
    names: Sequence[str] = ("one", "two"),
) -> Trace:
    """The trace of some layers' choices [T, K], each with weight 1 over K."""
    num_tokens = len(layers[0])
    lengths = tuple(lengths or (num_tokens,))
    domains = tuple(domains or (0,) * len(lengths))
    of_token = torch.repeat_interleave(torch.tensor(domains), torch.tensor(lengths))
    made = []
    for index, choices in enumerate(layers):
        counts = torch.stack(
            [
                torch.bincount(
                    choices[of_token == domain].flatten().clamp(max=num_experts), minlength=num_experts + 1
                )
                for domain in range(len(names))
            ]
        )[:, :num_experts]
        made.append(
            LayerTrace(
                index=index,
                shape=LayerShape(4, 8, num_experts),
                top_k=choices.shape[1],
                num_groups=1,
                expert_num_bytes=1,
                counts=counts,
                weight_sums=counts.double() / choices.shape[1],
                choices=choices,
                logits=None if logits is None else logits[index],
            )
        )
    return Trace(
        source_digest="made",
        model_type="made",
        domains=tuple(names),
        num_tokens=tuple(int((of_token == domain).sum()) for domain in range(len(names))),
        layers=tuple(made),
        sequence_lengths=lengths,
        sequence_domains=domains,
        token_ids=token_ids,
    )
