"""Tables of outcomes: what each model answered to each prompt, how good that was and what it cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
from jaxtyping import Float, Int

from mixtura.errors import UnknownNameError, UserError, counted_names
from mixtura.running.composing.digests import fraction
from mixtura.types.models import ModelCard, Outcome, Prompt


@final
@dataclass(frozen=True, slots=True, eq=False)
class ReplayTable:
    """Outcomes by prompt and model. Several of one pair are averaged; a pair without any is a hole, NaN.

    Attributes:
        prompts: by row, in the order in which they first came.
        cards: by column, by name.
        scores: in [0, 1].
        costs: pico-dollars; computed from tokens and prices where the outcome does not say.
        output_tokens: of the answers.
        outcomes: every one, as it came.
    """

    prompts: tuple[Prompt, ...]
    cards: tuple[ModelCard, ...]
    scores: Float[np.ndarray, "P M"]
    costs: Float[np.ndarray, "P M"]
    output_tokens: Float[np.ndarray, "P M"]
    outcomes: tuple[Outcome, ...] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The models."""
        return tuple(card.name for card in self.cards)

    @property
    def num_holes(self) -> int:
        """Pairs of prompt and model without a score."""
        return int(np.isnan(self.scores).sum())

    def rows(self, numbers: Sequence[int] | Int[np.ndarray, " N"]) -> ReplayTable:
        """The table of some of its prompts."""
        prompts = tuple(self.prompts[int(n)] for n in numbers)
        kept = {prompt.id for prompt in prompts}
        outcomes = tuple(one for one in self.outcomes if one.prompt in kept)
        picked = np.asarray(numbers, dtype=int)
        scores, costs, tokens = (x[picked] for x in (self.scores, self.costs, self.output_tokens))
        return ReplayTable(prompts, self.cards, scores, costs, tokens, outcomes)

    def only(self, names: Collection[str]) -> ReplayTable:
        """The table of some of its models.

        Raises:
            UnknownNameError: one of them is not there.
        """
        for name in names:
            if name not in self.names:
                raise UnknownNameError("model in the table", name, self.names)
        columns = [place for place, name in enumerate(self.names) if name in names]
        outcomes = tuple(one for one in self.outcomes if one.model in names)
        scores, costs, tokens = (x[:, columns] for x in (self.scores, self.costs, self.output_tokens))
        cards = tuple(self.cards[n] for n in columns)
        return ReplayTable(self.prompts, cards, scores, costs, tokens, outcomes)

    def complete(self) -> ReplayTable:
        """The table of the prompts that every model has a score for."""
        return self.rows(np.flatnonzero(~np.isnan(self.scores).any(1)))


def make_table(
    prompts: Iterable[Prompt], cards: Iterable[ModelCard], outcomes: Iterable[Outcome]
) -> ReplayTable:
    """The table of these outcomes. Models of outcomes that have no card get one without prices.

    Raises:
        UserError: an outcome of an unknown prompt, or one out of range; two prompts or cards of one name.
    """
    listed, rows = tuple(prompts), tuple(outcomes)
    known = {card.name: card for card in _distinct(cards)}
    for one in rows:
        known.setdefault(one.model, ModelCard(name=one.model))
    columns = {name: place for place, name in enumerate(sorted(known))}
    places = {prompt.id: place for place, prompt in enumerate(listed)}
    if len(places) != len(listed):
        twice = sorted({p.id for p in listed if sum(q.id == p.id for q in listed) > 1})
        raise UserError(f"prompts of the same id: {counted_names(twice)}; give each an id of its own")
    grids: dict[str, defaultdict[tuple[int, int], list[float]]] = {
        name: defaultdict(list) for name in ("score", "cost", "output_tokens")
    }
    for one in rows:
        if one.prompt not in places:
            raise UserError(f"an outcome is of the prompt {one.prompt!r}, which is not in the table")
        at = places[one.prompt], columns[one.model]
        for name, value in _numbers(one, listed[at[0]], known[one.model]).items():
            grids[name][at].append(value)
    shape = len(listed), len(columns)
    scores, costs, tokens = (_averaged(grid, shape) for grid in grids.values())
    return ReplayTable(listed, tuple(known[name] for name in columns), scores, costs, tokens, rows)


def _distinct(cards: Iterable[ModelCard]) -> tuple[ModelCard, ...]:
    listed = tuple(cards)
    names = [card.name for card in listed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"cards of the same name: {counted_names(twice)}; give each model one card")
    return listed


def _numbers(one: Outcome, prompt: Prompt, card: ModelCard) -> Mapping[str, float]:
    """What an outcome says, its cost computed where it gives tokens and the card prices."""
    found: dict[str, float] = {}
    if one.score is not None:
        if not 0 <= one.score <= 1:
            raise UserError(
                f"the score of {one.model} on {one.prompt} is {one.score}; scores lie between 0 and 1"
            )
        found["score"] = one.score
    cost = one.cost
    if cost is None and one.output_tokens is not None:
        tokens = prompt.input_tokens if one.input_tokens is None else one.input_tokens
        cost = card.cost(tokens, one.output_tokens)
    if cost is not None:
        if not 0 <= cost < float("inf"):
            raise UserError(f"the cost of {one.model} on {one.prompt} is {cost}; give dollars, 0 or more")
        found["cost"] = cost
    if one.output_tokens is not None:
        found["output_tokens"] = one.output_tokens
    return found


def _averaged(
    found: Mapping[tuple[int, int], Sequence[float]], shape: tuple[int, int]
) -> Float[np.ndarray, "P M"]:
    out = np.full(shape, np.nan)
    for at, values in found.items():
        out[at] = sum(values) / len(values)
    return out


def split(table: ReplayTable, share: float, seed: int | str) -> tuple[ReplayTable, ReplayTable]:
    """Two tables of different prompts, the first with about ``share`` of them.

    Which prompt goes where is settled by its text (its id where it has none) and the seed, whatever else is
    in the table; so the same text never stands on both sides.
    """
    at = np.array([fraction(prompt.text or prompt.id, seed) for prompt in table.prompts])
    return table.rows(np.flatnonzero(at < share)), table.rows(np.flatnonzero(at >= share))
