"""One token's choices of experts, and what comes of forbidding each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from mixtura.methods.analyses import ROWS_AT_ONCE, Evidence, Grid, Read, Study
from mixtura.methods.analyses._masking import as_if_without


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """One choice of the token's route, and what comes of forbidding it."""

    layer: int
    expert: int
    weight: float
    influence: float | None
    guess: str
    instead: str
    use: str


def edges_of(study: Study, evidence: Evidence, prefix: list[int], after: int, plain: Read) -> list[Edge]:
    """Every choice of the last token with its counterfactual, layer by layer, the heaviest first."""
    cases = []
    for layer in study.layers:
        chosen, weights = plain.chosen[layer.index][-1], plain.weights[layer.index][-1]
        for place in weights.argsort(descending=True).tolist():
            expert = int(chosen[place])
            if 0 <= expert < layer.num_experts:
                free = layer.num_experts > layer.top_k
                steering = as_if_without(layer.num_experts, (expert,)) if free else None
                cases.append((layer, expert, float(weights[place]), steering))
    able = [(layer.index, steering) for layer, _, _, steering in cases if steering is not None]
    made: list[Read] = []
    for start in range(0, len(able), ROWS_AT_ONCE):
        part = [{index: steering} for index, steering in able[start : start + ROWS_AT_ONCE]]
        made += study.run([prefix] * len(part), steering=part, last_only=True)
    reads, found = iter(made), []
    for layer, expert, weight, steering in cases:
        other = None if steering is None else next(reads)
        instead = "" if other is None else _instead(other, plain, layer.index)
        guess = "" if other is None else study.words([int(other.logits[-1].argmax())])[0]
        found.append(
            Edge(
                layer=layer.index,
                expert=expert,
                weight=weight,
                influence=None if other is None else loss_of(other, after) - loss_of(plain, after),
                guess=guess,
                instead=instead,
                use=_use(evidence, layer.index, expert),
            )
        )
    return found


def loss_of(read: Read, after: int) -> float:
    return -float(read.logits[-1].double().log_softmax(-1)[after])


def _instead(other: Read, plain: Read, index: int) -> str:
    """Experts that the last token has now and had not before."""
    before = set(plain.chosen[index][-1].tolist())
    return ", ".join(str(one) for one in sorted(set(other.chosen[index][-1].tolist()) - before))


def _use(evidence: Evidence, index: int, expert: int) -> str:
    """The domain whose tokens choose an expert most often."""
    if not evidence.traces or len(evidence.trace.domains) < 2:
        return ""
    trace = evidence.trace
    shares = trace.layer(index).counts[:, expert].double() / torch.tensor(trace.num_tokens).clamp(min=1)
    return trace.domains[int(shares.argmax())] if bool(shares.sum()) else ""


def influence_map(study: Study, edges: list[Edge]) -> Grid:
    """Influences, layers down and choices across, the heaviest first."""
    widest = max((layer.top_k for layer in study.layers), default=1)
    values = []
    for layer in study.layers:
        row = [edge.influence for edge in edges if edge.layer == layer.index]
        values.append(tuple([*row, *[None] * widest][:widest]))
    return Grid(
        title="Influence of each choice on the loss, nats",
        values=tuple(values),
        row_labels=tuple(str(layer.index) for layer in study.layers),
        column_labels=tuple(str(place + 1) for place in range(widest)),
        column_name="choice, by weight",
        signed=True,
    )
