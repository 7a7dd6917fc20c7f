"""What is measured on a trained model of the arena: bits per byte, balance, specialisation, time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods._scores import violation
from mixtura.train.arena.text import HeldOut, labels_of
from mixtura.types import Routing

Choices = list[frozenset[int]]
TIMED_ROUNDS = 9


@final
@dataclass(frozen=True, slots=True)
class Judged:
    """An evaluation: bits per byte by domain, each layer's load by domain, and who went where.

    ``loads`` and ``experts_per_token`` are None for a model without experts.
    """

    bits: tuple[float, ...]
    loads: Sequence[Float[Tensor, "G _"]] | Float[Tensor, "L G E"] | None
    choices: Choices
    experts_per_token: float | None


@torch.no_grad()
def judge(model: Any, held_out: Sequence[HeldOut]) -> Judged:
    """Evaluate on held-out sequences."""
    was_training = model.training
    model.eval()
    bits, by_domain = [], []
    choices: list[set[int]] = []
    assigned = seen = 0
    for part in held_out:
        labels = labels_of(torch.full((part.input_ids.shape[0],), part.domain))
        output = model(
            input_ids=part.input_ids,
            labels=part.input_ids,
            token_labels=labels,
            output_routing=True,
            use_cache=False,
        )
        nats = float(output.loss) * part.input_ids[:, 1:].numel()
        bits.append(nats / math.log(2) / part.num_bytes)
        routings: tuple[Routing, ...] = output.routings
        by_domain.append([weight_loads(one) for one in routings])
        choices = choices or [set() for _ in routings]
        for place, one in enumerate(routings):
            tokens = one.token_ids * one.num_experts + one.expert_ids
            choices[place] |= {(part.domain << 40) + pair for pair in tokens.tolist()}
            assigned += one.token_ids.numel()
        seen += len(routings) * part.input_ids.numel()
    model.train(was_training)
    layers = [torch.stack(layer) for layer in zip(*by_domain, strict=True)]
    alike = len({layer.shape for layer in layers}) == 1
    loads = (torch.stack(layers) if alike else layers) if choices else None
    return Judged(tuple(bits), loads, [frozenset(one) for one in choices], assigned / seen if seen else None)


def weight_loads(routing: Routing) -> Float[Tensor, " E"]:
    """Assignments per expert; a mixer's shares, since it sends everything everywhere."""
    everywhere = routing.token_ids.numel() == routing.num_tokens * routing.num_experts
    if everywhere:
        return torch.zeros(routing.num_experts).index_add(0, routing.expert_ids, routing.weights.float())
    return routing.load.float()


def balance(loads: Sequence[Float[Tensor, "G _"]] | Float[Tensor, "L G E"]) -> dict[str, float]:
    """How even the load is: the worst layer's fullest expert over the mean, and experts without tokens."""
    by_layer = [one.sum(0) for one in loads]
    return {
        "max_over_mean": max(float(violation(one)) + 1 for one in by_layer),
        "dead_experts": statistics.fmean(float((one == 0).sum()) for one in by_layer),
    }


def specialisation(loads: Sequence[Float[Tensor, "G _"]] | Float[Tensor, "L G E"]) -> float:
    """The share of choices that would have to move for two domains to use experts alike; mean of pairs."""
    found = []
    for one in loads:
        shares = one / one.sum(-1, keepdim=True).clamp(min=1e-12)
        pairs = combinations(range(len(shares)), 2)
        found.append(statistics.fmean(float((shares[a] - shares[b]).abs().sum()) / 2 for a, b in pairs))
    return statistics.fmean(found)


def changed(before: Choices, after: Choices) -> float:
    """The share of assignments that are others at a later checkpoint, over layers."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a or b]
    if not pairs:
        return 0.0
    return statistics.fmean(1 - len(a & b) / max(len(a), len(b)) for a, b in pairs)


@torch.no_grad()
def overhead(model: Any, reference: Any, held_out: Sequence[HeldOut]) -> tuple[float, float]:
    """Time of a forward pass beside that of plain top-k: more microseconds a token, and the ratio.

    Both run in turns on one thread, timed by the processor's time for it, so that other work on the
    machine counts little; medians.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ids = torch.cat([part.input_ids[:8] for part in held_out])
    domains = torch.cat([torch.full((len(part.input_ids[:8]),), part.domain) for part in held_out])
    model.eval()
    reference.eval()
    times: list[tuple[float, float]] = []
    for _ in range(TIMED_ROUNDS + 1):
        both = []
        for one in (model, reference):
            start = time.thread_time()
            one.model(input_ids=ids, token_labels=labels_of(domains), use_cache=False)
            both.append(time.thread_time() - start)
        times.append((both[0], both[1]))
    torch.set_num_threads(threads)
    kept = times[1:]
    more = statistics.median(a - b for a, b in kept) / ids.numel() * 1e6
    return more, statistics.median(a / b for a, b in kept)
