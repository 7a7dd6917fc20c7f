"""The arena of aggregators: policies replayed on a table of answers, beside single models and mixtures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Float

from mixtura.errors import UnknownNameError, UserError
from mixtura.methods import create, header, own_names
from mixtura.methods.aggregators import Aggregator, answer_in
from mixtura.running.composing.asking import Runner
from mixtura.running.composing.measures import hull, middle, resampled
from mixtura.running.composing.tables import ReplayTable, split
from mixtura.running.composing.upstreams import Replay
from mixtura.types.asking import Answer
from mixtura.types.models import PICO_PER_DOLLAR

# One call to the model that was best on the other half: what all others are held against.
BASELINE: Final = "single"
_LEAST_PROMPTS: Final = 20
_NUM_DRAWS: Final = 1000
_HALF: Final = 0.5


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStanding:
    """One policy, or one model, on the prompts of a table.

    Attributes:
        name: of the method or the model.
        is_model: whether it is a single model.
        score: mean of its answers; no answer has none.
        low, high: the 95 % bootstrap interval over prompts.
        over_mix: the score less that of single models mixed at random at the same mean cost.
        over_mix_low, over_mix_high: its interval.
        cost: dollars for a thousand prompts; NaN where the table has none.
        calls: mean number for a prompt.
        abstained: share of prompts without an answer.
        verdict: in words.
    """

    name: str
    is_model: bool
    score: float
    low: float
    high: float
    over_mix: float
    over_mix_low: float
    over_mix_high: float
    cost: float
    calls: float
    abstained: float
    verdict: str


def hold_policies(
    table: ReplayTable, names: Sequence[str], say: Callable[[str], None], seed: int = 0
) -> list[PolicyStanding]:
    """Replay policies on half of a table; which models are preferred comes from the other half.

    Only methods that ask nothing but the prompt itself can be replayed. Samples that a table does not have
    come back as calls that failed.

    Raises:
        UnknownNameError: there is no such method, or it cannot be replayed.
        UserError: the table has no answers, or too few prompts that every model answered.
    """
    known = [name for name in own_names("aggregators") if "replays" in header("aggregators", name).tags]
    for name in names:
        if name not in known:
            raise UnknownNameError("aggregator that a table can answer", name, known)
    train, rest = split(table, _HALF, f"policies {seed}")
    answered = {(one.prompt, one.model) for one in table.outcomes if one.answer is not None}
    whole = [n for n, p in enumerate(rest.prompts) if all((p.id, name) in answered for name in table.names)]
    test = rest.rows(whole).complete()
    if len(test.prompts) < _LEAST_PROMPTS or not train.prompts:
        raise UserError(
            f"the arena takes {2 * _LEAST_PROMPTS} prompts or so with an answer and a score of every model, "
            f"in a column 'answer'; half of the table has {len(test.prompts)}"
        )
    # A model without a score there is taken for the worst.
    seen = ~np.isnan(train.scores)
    means = np.where(seen, train.scores, 0.0).sum(0) / np.maximum(seen.sum(0), 1)
    cards = [test.cards[n] for n in np.argsort(-means, kind="stable")]
    exam = _Exam(test, _costs(test), resampled(len(test.prompts), _NUM_DRAWS, seed), hull_of(train, means))
    runner = Runner(cards, Replay(test))
    rows = []
    for name in (one for one in known if not names or one in (*names, BASELINE)):
        say(f"{name}: {len(test.prompts)} prompts")
        method: Aggregator = create("aggregators", name)
        rows.append(exam.policy(name, runner.run_all(method, test.prompts)))
    rows += [exam.model(place) for place in range(len(test.cards))]
    return sorted(rows, key=lambda one: (-one.score, one.name))


def hull_of(train: ReplayTable, means: Float[np.ndarray, " M"]) -> list[int]:
    """Columns of the single models worth mixing, by their means where nothing is measured on."""
    return hull(_costs(train).mean(0), means)


def _costs(table: ReplayTable) -> Float[np.ndarray, "P M"]:
    """Costs; 0 throughout where one is not known, so that no policy seems cheap for a hole."""
    return np.zeros_like(table.costs) if np.isnan(table.costs).any() else table.costs


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Exam:
    """The prompts that policies are measured on."""

    table: ReplayTable
    costs: Float[np.ndarray, "P M"]
    weights: Float[np.ndarray, "P D"]
    line: list[int]

    def policy(self, name: str, answers: Sequence[Answer]) -> PolicyStanding:
        """A policy by its answers."""
        scores = _judged(self.table, answers)
        known = bool(self.costs.any())
        costs = np.array([float(answer.cost) if known else 0.0 for answer in answers])
        calls = float(np.mean([len(answer.calls) for answer in answers]))
        abstained = float(np.mean([answer.abstained for answer in answers]))
        return self._standing(name, scores, costs, calls, abstained, is_model=False)

    def model(self, place: int) -> PolicyStanding:
        """A single model."""
        name = self.table.names[place]
        return self._standing(
            name, self.table.scores[:, place], self.costs[:, place], 1.0, 0.0, is_model=True
        )

    def _standing(
        self,
        name: str,
        scores: Float[np.ndarray, " P"],
        costs: Float[np.ndarray, " P"],
        calls: float,
        abstained: float,
        *,
        is_model: bool,
    ) -> PolicyStanding:
        drawn, spent = scores @ self.weights, costs @ self.weights
        mixed = self._mixed(spent)
        over, (low, high) = drawn - mixed, middle(drawn - mixed)
        verdict = "beats single models mixed at its cost" if low > 0 else "does not beat single models mixed"
        if high < 0:
            verdict = "behind single models mixed at its cost"
        ends = middle(drawn)
        return PolicyStanding(
            name=name,
            is_model=is_model,
            score=float(drawn[0]),
            low=ends[0],
            high=ends[1],
            over_mix=float(over[0]),
            over_mix_low=low,
            over_mix_high=high,
            cost=float(spent[0]) * 1000 / PICO_PER_DOLLAR if self.costs.any() else float("nan"),
            calls=calls,
            abstained=abstained,
            verdict="one model" if is_model else verdict,
        )

    def _mixed(self, spent: Float[np.ndarray, " D"]) -> Float[np.ndarray, " D"]:
        """What single models reach, mixed so that they cost the same; by draw."""
        scores = self.table.scores[:, self.line].T @ self.weights
        costs = self.costs[:, self.line].T @ self.weights
        if not self.costs.any():
            out: np.ndarray = scores[-1]
            return out
        return np.array(
            [np.interp(spent[d], costs[:, d], scores[:, d]) for d in range(self.weights.shape[1])]
        )


def _judged(table: ReplayTable, answers: Sequence[Answer]) -> Float[np.ndarray, " P"]:
    """The score of each answer: what the table's rows with that answer scored on average."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in table.outcomes:
        if one.answer is not None and one.score is not None:
            scores[one.prompt, answer_in(one.answer)].append(one.score)
    found = [
        0.0 if answer.abstained else float(np.mean(scores[prompt.id, answer_in(answer.text)]))
        for prompt, answer in zip(table.prompts, answers, strict=True)
    ]
    return np.array(found)
