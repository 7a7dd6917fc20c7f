"""Which of several speed-ups pays in a case that was not measured?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from mixtura.errors import UserError, check_range, suggest
from mixtura.methods.analyses import Analysis, Cell, Evidence, Report, Table
from mixtura.methods.analyses._selection import Learner, by_group, cases_of, left_out, shared_features
from mixtura.methods.analyses._shared import mean_of, number_of
from mixtura.methods.settings import key_and_value

METHOD = {
    "paper": 173,
    "title": "Meta-Learning for Speeding Up Large Model Inference in Decentralized Environments",
    "tags": ["needs:runs"],
}


def _example() -> tuple[dict[str, Cell], ...]:
    """Three models and three sizes of a batch; one way is fast for few tokens, the other for many."""
    return tuple(
        {"model": model, "num_tokens": tokens, "name": name, "tokens_per_s": float(speed)}
        for place, model in enumerate(("one", "two", "three"))
        for tokens in (1, 16, 256)
        for name, speed in (("narrow", 100 + 9 * place), ("wide", 20 * tokens**0.5 + 9 * place))
    )


@final
class SpeedupChoice(Analysis):
    """Which speed-up pays: learnt from benchmarks, tested on models or machines that were left out.

    A row of the table is a measurement of one ``method`` (the column "name", if not said) under some
    circumstances; its ``score`` ("tokens_per_s") is better the greater it is (with ``smaller`` the smaller).
    Rows that agree in their ``features`` are a case; without names these are the columns of words and whole
    numbers that have the same values for every method. For each value of ``group`` ("model") in turn a
    regression learns from all other cases to predict each method's score, and chooses the best for those of
    the group: ``regret`` is what it loses against the best that was measured there, on average,
    ``regret_of_average`` what the method loses that is best on average of the others, and
    ``regret_of_chance`` what a choice by lot does. Only where the first is the least is there something to
    learn.

    With ``case``, such as ``["model=OLMoE", "num_tokens=1"]``, a table says what each method is predicted to
    do there.

    Shapes:
        A table of cases by methods to a table of groups, and a ranking of methods.

    Raises:
        SettingError: ``ridge`` is out of range.
        UserError: a column is missing, or there are too few cases or groups to leave one out.

    Example:
        >>> report = SpeedupChoice(ridge=0.01).measure(Evidence(runs=SpeedupChoice.example))
        >>> report.scalars["regret"], round(report.scalars["regret_of_average"], 2)
        (0.0, 0.22)

    Differences from the paper:
        Its abstract alone was read. The learner is a ridge regression of log scores on features; the paper's
        is not known to us. It measures in a decentralised system; here what counts is the table that is
        given, such as those of this project's benchmarks.

    Reference:
        Meta-Learning for Speeding Up Large Model Inference in Decentralized Environments (paper 173).
    """

    example: ClassVar[tuple[Mapping[str, Cell], ...]] = _example()

    def __init__(
        self,
        *,
        method: str | None = None,
        score: str | None = None,
        smaller: bool = False,
        group: str | None = None,
        features: list[str] = [],  # noqa: B006 - never changed
        ridge: float = 0.1,
        case: list[str] = [],  # noqa: B006 - never changed
    ) -> None:
        check_range("SpeedupChoice", "ridge", ridge, 1e-9, 1e9)
        self.method, self.score, self.smaller, self.group = method, score, smaller, group
        self.features, self.ridge, self.case = features, ridge, case

    def measure(self, evidence: Evidence) -> Report:
        method, score, group = self.method or "name", self.score or "tokens_per_s", self.group or "model"
        runs = evidence.table(method, score, group, *self.features, least=4)
        rows = [{**row, score: self._turned(number_of(row, score, positive=True))} for row in runs]
        named = self.features or shared_features(rows, method, score)
        features = list(dict.fromkeys([group, *named]))
        cases = cases_of(rows, method, score, features)
        groups = list(dict.fromkeys(case.features[group] for case in cases))
        if len(groups) < 2:
            raise UserError(
                f"there are {len(cases)} cases of {len(groups)} values of {group}, and two values are the "
                "least, to leave one out; give more measurements, or another column by group"
            )
        found = left_out(cases, group, self.ridge)
        scalars: dict[str, float | None] = {
            "regret": mean_of(one.regret for one in found),
            "regret_of_average": mean_of(one.of_average for one in found),
            "regret_of_chance": mean_of(one.of_chance for one in found),
            "cases": len(cases),
            "methods": len({name for case in cases for name in case.scores}),
        }
        tables = [by_group(group, found)]
        if self.case:
            made = Learner(cases, self.ridge).predict(self._features(features))
            ranking = sorted(((name, self._turned(value)) for name, value in made.items()), key=self._key)
            title = "Predicted for the case, the best first"
            tables.append(Table(title=title, columns=("method", score), rows=tuple(ranking)))
        told = f"Cases are told apart by {', '.join(features)}."
        return Report(scalars, sentences=(told,), tables=tuple(tables))

    def _turned(self, value: float) -> float:
        """A score of which more is better as one of which less is, and back, where it is such a one."""
        return 1 / value if self.smaller else value

    def _key(self, row: tuple[str, float]) -> float:
        return row[1] if self.smaller else -row[1]

    def _features(self, known: Sequence[str]) -> dict[str, Cell]:
        """What ``case`` says: numbers where they are such, else words."""
        found: dict[str, Cell] = {}
        for pair in self.case:
            name, value = key_and_value(pair)
            if name not in known:
                raise UserError(
                    f"case of SpeedupChoice has no feature {name!r}; {suggest(name, known)}, and name more "
                    "columns by features if they tell cases apart"
                )
            try:
                found[name] = float(value)
            except ValueError:
                found[name] = value.strip()
        return found
