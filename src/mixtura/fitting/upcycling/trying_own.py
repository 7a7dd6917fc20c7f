"""Trying a model of mixtura's own that was made of dense ones: in memory, as it is read by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from mixtura.fitting.quality import HeldOut, Scores, join, score_chunk
from mixtura.fitting.upcycling.records import Balance
from mixtura.fitting.upcycling.trying import compared, summary
from mixtura.running.loading import load_own_model

# Sequences that run together; positions whose logits are compared together.
_ROWS, _POSITIONS = 4, 256


def tried_own(
    path: Path,
    name: str,
    held_out: Sequence[HeldOut],
    states: Sequence[Tensor] | None,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Fields of `Upcycled`: ``after``, ``balance`` and, with another model's final states, ``beside``.

    Args:
        path: the model, which is taken into memory.
        name: what it is called.
        held_out: the text.
        states: of another model with the same head, by text; None to compare with none.
        notify: told what is being done.
    """
    notify(f"trying {name} on held-out text")
    trial = _Trial(load_own_model(path))
    scores = [
        trial.run(text, None if states is None else states[place]) for place, text in enumerate(held_out)
    ]
    beside = None if states is None else compared(scores, trial.differences, trial.moments)
    return {"after": summary(name, held_out, scores), "beside": beside, "balance": trial.balance()}


@final
class _Trial:
    """One model as it reads text."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.differences: list[float] = []
        self.moments: list[tuple[float, float, int]] = []
        self.loads: list[Tensor] = []

    @torch.no_grad()
    def run(self, text: HeldOut, states: Tensor | None) -> Scores:
        """Scores of the text; beside itself where there are no states of another."""
        chunks = list[Scores]()
        targets = text.input_ids.roll(-1, 1)
        for rows in torch.arange(len(text.input_ids)).split(_ROWS):
            output = self.model.model(text.input_ids[rows], text.attention_mask[rows], use_cache=False)
            self._count(output.routings)
            wanted = text.predicted[rows]
            own = output.last_hidden_state[wanted]
            other = own if states is None else states[rows][wanted].to(own.dtype)
            parts = (one.split(_POSITIONS) for one in (own, other, targets[rows][wanted]))
            for mine, theirs, following in zip(*parts, strict=True):
                logits, reference = self.model.lm_head(mine), self.model.lm_head(theirs)
                chunks.append(score_chunk(reference, logits, following))
                self._compare(logits, reference)
        return join(chunks)

    def balance(self) -> tuple[Balance, ...]:
        """How evenly experts shared all the text, by layer."""
        found = []
        for index, load in zip(self._layers(), self.loads, strict=True):
            even = max(float(load.mean()), 1e-12)
            busiest = float(load.max()) / even
            found.append(Balance(layer=index, busiest=busiest, idle=int((load == 0).sum())))
        return tuple(found)

    def _layers(self) -> list[int]:
        plans = self.model.config.plans
        return [layer for layer, plan in enumerate(plans) if plan is not None]

    def _count(self, routings: Sequence[Any]) -> None:
        loads = [routing.load.double() for routing in routings]
        self.loads = [a + b for a, b in zip(self.loads, loads, strict=True)] if self.loads else loads

    def _compare(self, logits: Tensor, other: Tensor) -> None:
        self.differences.append(float((logits.float() - other.float()).abs().max()))
        wide = other.double()
        self.moments.append((float(wide.sum()), float((wide * wide).sum()), wide.numel()))
