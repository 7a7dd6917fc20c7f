"""How well an ensemble foretells text, beside each of its models alone and the best of them in hindsight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mixtura.methods.ensembles import NO_TARGET, Ensemble, Text, chosen
from mixtura.running.ensembling.lessons import Row, lesson_of
from mixtura.running.ensembling.team import Team, frozen

ALL = "all"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What texts cost, in nats a token, by domain; of all texts under ``all``.

    Attributes:
        num_tokens: that were foretold.
        losses: of the ensemble.
        alone: of each model by itself.
        best_by_text: of the model that is best for each text in hindsight.
        best_by_token: of the model that is best for each token in hindsight; none that picks can be better.
        shares: what part each model had in the ensemble.
    """

    num_tokens: dict[str, int]
    losses: dict[str, float]
    alone: dict[str, list[float]]
    best_by_text: dict[str, float]
    best_by_token: dict[str, float]
    shares: dict[str, list[float]]

    @property
    def best_single(self) -> float:
        """The loss of all texts of the best model for them."""
        return min(self.alone[ALL])


@torch.no_grad()
def score(ensemble: Ensemble, team: Team, rows: Sequence[Row], batch: int = 8) -> Scored:
    """Foretell what comes after each row's prompt."""
    ensemble.eval()
    sums: dict[str, Tensor] = {}
    number = len(team.models)
    with frozen(team):
        for begin in range(0, len(rows), batch):
            some = rows[begin : begin + batch]
            for row, found in zip(some, _of_batch(ensemble, team, some), strict=True):
                for domain in {ALL, row.domain or ALL}:
                    sums[domain] = sums.get(domain, torch.zeros_like(found)) + found
    means = {name: (one[1:] / one[0]).tolist() for name, one in sums.items()}
    return Scored(
        num_tokens={name: int(one[0]) for name, one in sums.items()},
        losses={name: one[0] for name, one in means.items()},
        best_by_text={name: one[1] for name, one in means.items()},
        best_by_token={name: one[2] for name, one in means.items()},
        alone={name: one[3 : 3 + number] for name, one in means.items()},
        shares={name: one[3 + number :] for name, one in means.items()},
    )


def _of_batch(ensemble: Ensemble, team: Team, rows: Sequence[Row]) -> Tensor:
    """By row: tokens; sums of the losses of the ensemble, the best models and each model; of the shares."""
    lesson = lesson_of(rows, team)
    mixed = ensemble(lesson.text)
    counts = (lesson.targets != NO_TARGET).double()
    losses = -chosen(mixed.log_probabilities, lesson.targets).double()
    alone = -torch.stack([_said(lesson.text, place, lesson.targets) for place in range(len(team.models))], -1)
    each = alone.sum(1)
    parts = [counts.sum(1), losses.sum(1), each.amin(-1), alone.amin(-1).sum(1)]
    shares = (mixed.shares.double() * counts[..., None]).sum(1)
    return torch.cat([torch.stack(parts, -1), each, shares], dim=-1)


def _said(text: Text, model: int, targets: Tensor) -> Tensor:
    return chosen(text.logits(model).log_softmax(-1), targets).double()
