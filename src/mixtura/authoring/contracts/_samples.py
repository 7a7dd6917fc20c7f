"""Small made-up routings and traces that contracts, doctests and tests use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.methods import names
from mixtura.types import LayerShape, Routing
from mixtura.types.placement import Cluster, Link
from mixtura.types.trace import LayerTrace, Trace
from mixtura.types.upcycling import DenseShape, DenseTrace, LayerInputs

DOMAINS = ("prose", "code")


def sample_routing(
    seed: int = 0, *, num_tokens: int = 64, num_experts: int = 8, top_k: int = 2, hot: float = 0.0
) -> Routing:
    """A softmax top-k routing of made-up tokens; the last eighth of them is padding.

    Args:
        seed: of the logits.
        num_tokens: T.
        num_experts: E.
        top_k: K.
        hot: what is added to the logits of expert 0; 0 is about balanced.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    logits[:, 0] += hot
    logits.requires_grad_()
    scores = logits.softmax(-1)
    weights, chosen = scores.topk(top_k)
    valid = torch.arange(num_tokens) < num_tokens - num_tokens // 8
    return Routing.from_choices(chosen, weights, scores=scores, logits=logits, valid=valid)


def sample_trace(
    seed: int = 0,
    *,
    num_layers: int = 2,
    num_experts: int = 8,
    top_k: int = 2,
    num_groups: int = 1,
    top_groups: int = 1,
    num_tokens: int = 240,
) -> Trace:
    """A trace of made-up text in two domains, with every statistic and feature there is.

    Experts differ in how often they are chosen; counts, co-activation, transitions, choices and logits are
    of the same made-up tokens. Tokens take turns between the domains, whatever sequences say; an expert takes
    1000 bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    domain = torch.arange(num_tokens) % len(DOMAINS)
    logits = []
    for _ in range(num_layers):
        liking = torch.randn(len(DOMAINS), num_experts, generator=generator)
        noise = torch.randn(num_tokens, num_experts, generator=generator)
        logits.append(liking[domain] + noise)
    chosen = [one.topk(top_k).indices for one in logits]
    layers = []
    for index, choices in enumerate(chosen):
        counts = torch.stack([_counts(choices[domain == d], num_experts) for d in range(len(DOMAINS))])
        drawn = torch.rand(len(DOMAINS), num_experts, generator=generator)
        made = _layer(index, seed, choices, logits[index], counts, counts * (0.2 + 0.6 * drawn))
        following = chosen[index + 1] if index + 1 < num_layers else None
        transitions = None if following is None else _pairs(choices, following, num_experts)
        made = replace(made, transitions=transitions, num_groups=num_groups, top_groups=top_groups)
        layers.append(made)
    num_per_domain = tuple(torch.bincount(domain, minlength=len(DOMAINS)).tolist())
    return Trace(
        source_digest=f"sample:{seed}",
        model_type="sample",
        domains=DOMAINS,
        num_tokens=num_per_domain,
        layers=tuple(layers),
        sequence_lengths=(num_tokens // 3, num_tokens - num_tokens // 3),
        sequence_domains=(0, 1),
        token_ids=torch.randint(0, 12, (num_tokens,), generator=torch.Generator().manual_seed(0)),
    )


def _layer(
    index: int,
    seed: int,
    choices: Int[Tensor, "T K"],
    logits: Float[Tensor, "T E"],
    counts: Int[Tensor, "M E"],
    weight_sums: Float[Tensor, "M E"],
) -> LayerTrace:
    """A layer of these choices, without groups, with every statistic and feature there is."""
    num_experts = logits.shape[1]
    return LayerTrace(
        index=index,
        shape=LayerShape(16, 32, num_experts),
        top_k=choices.shape[1],
        num_groups=1,
        expert_num_bytes=1000,
        counts=counts,
        weight_sums=weight_sums,
        statistics={name: _statistic(name, seed + index, counts) for name in names("statistics")},
        features=_features(seed + index, counts),
        coactivation=_pairs(choices, choices, num_experts).fill_diagonal_(0),
        choices=choices,
        logits=logits,
    )


def sample_cluster(num_nodes: int = 2, devices_per_node: int = 2) -> Cluster:
    """A made-up cluster whose nodes are connected ten times as slowly as the devices in them."""
    return Cluster(
        num_nodes=num_nodes,
        devices_per_node=devices_per_node,
        flops_per_s=1e12,
        memory_num_bytes=1 << 30,
        within=Link(latency_s=1e-5, bytes_per_s=1e10),
        between=Link(latency_s=5e-5, bytes_per_s=1e9),
    )


def relabelled(trace: Trace, orders: Sequence[Int[Tensor, " E"]]) -> Trace:
    """The trace of the same model with each layer's experts in another order.

    Args:
        trace: of a model without expert groups.
        orders: per layer, the old number of the expert at each new place.
    """
    layers = []
    for number, (layer, order) in enumerate(zip(trace.layers, orders, strict=True)):
        changed: dict[str, Any] = {
            "counts": layer.counts[:, order],
            "weight_sums": layer.weight_sums[:, order],
            "statistics": {name: values[:, order] for name, values in layer.statistics.items()},
            "features": {name: values[order] for name, values in layer.features.items()},
        }
        if "logit_products" in layer.features:
            changed["features"]["logit_products"] = layer.features["logit_products"][order][:, order]
        if layer.coactivation is not None:
            changed["coactivation"] = layer.coactivation[order][:, order]
        if layer.transitions is not None:
            changed["transitions"] = layer.transitions[order][:, orders[number + 1]]
        if layer.choices is not None:
            changed["choices"] = order.argsort()[layer.choices]
        if layer.logits is not None:
            changed["logits"] = layer.logits[:, order]
        layers.append(replace(layer, **changed))
    return replace(trace, layers=tuple(layers))


def _counts(choices: Int[Tensor, "T K"], num_experts: int) -> Int[Tensor, " E"]:
    return torch.bincount(choices.flatten(), minlength=num_experts)


def _pairs(here: Int[Tensor, "T K"], there: Int[Tensor, "T K"], num_experts: int) -> Int[Tensor, "E E"]:
    """How often a token chose expert i here and expert j there."""
    both = here[:, :, None] * num_experts + there[:, None, :]
    return torch.bincount(both.flatten(), minlength=num_experts**2).view(num_experts, num_experts)


def _features(seed: int, counts: Int[Tensor, "M E"]) -> dict[str, Float[Tensor, "E _"]]:
    """Made-up mean outputs and products of logits."""
    generator = torch.Generator().manual_seed(crc32(b"features") + seed)
    num_experts = counts.shape[1]
    outputs = torch.randn(num_experts, 16, generator=generator, dtype=torch.float64)
    logits = torch.randn(50, num_experts, generator=generator, dtype=torch.float64)
    return {
        "mean_output": outputs * (counts.sum(0) > 0)[:, None],
        "logit_products": logits.T @ logits,
    }


def _statistic(name: str, seed: int, counts: Int[Tensor, "M E"]) -> Float[Tensor, "M E"]:
    """Made-up values per expert and domain, the same whatever other statistics there are."""
    generator = torch.Generator().manual_seed(crc32(name.encode()) + seed)
    return torch.rand(counts.shape, generator=generator) * (counts > 0)


def sample_dense_trace(dense: DenseShape, seed: int = 0, *, num_groups: int = 1) -> DenseTrace:
    """What made-up text saw of a dense model: group i is for source i, four sequences of ten tokens."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(dense.num_layers):
        inputs = torch.randn(num_groups, 4, 10, dense.d_model, generator=generator)
        inputs += torch.randn(num_groups, 1, 1, dense.d_model, generator=generator)
        flat = torch.cat([inputs.reshape(-1, dense.d_model), torch.ones(40 * num_groups, 1)], 1).double()
        of = torch.arange(num_groups).repeat_interleave(40)
        layers.append(
            LayerInputs(
                means=inputs.mean((1, 2)),
                lasts=inputs[:, :, -1].mean(1),
                counts=torch.full((num_groups,), 40),
                products=flat.T @ flat,
                targets=flat.T @ torch.nn.functional.one_hot(of, num_groups).double(),
                activations=torch.rand(dense.d_ffn, generator=generator),
                often=torch.rand(dense.d_ffn, generator=generator),
                largest=torch.rand(40, dense.d_ffn, generator=generator).topk(min(10, dense.d_ffn)).indices,
                domains=torch.rand(4, dense.d_ffn, generator=generator),
            )
        )
    embeddings = torch.randn(num_groups, dense.d_model, generator=generator)
    return DenseTrace(
        layers=tuple(layers),
        embeddings=embeddings,
        experts=tuple(range(num_groups)),
        negative=(False,) * num_groups,
    )
