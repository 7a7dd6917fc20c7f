"""Votes that weigh as much as each model was right on questions like this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import alike, answer_in, good, plain, plurality, question, told
from mixtura.types.asking import Ask, Reply, Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 176,
    "title": "Make Still Further Progress: Chain of Thoughts for Tabular Data Leaderboard",
    "tags": ["needs:examples", "votes"],
}
_TASK = (
    "Several predictors answered a question that you cannot see. Below are what they answered to the "
    "questions most like it, with the true answers, then what they answer now.\n\n{context}\n\nFirst say how "
    "reliable each predictor was on these, then weigh what they answer now, and end with a line 'Answer: ' "
    "and the answer."
)


@final
class NeighbourVotes(Aggregator):
    """Instance-wise ensemble: ask all models the question and the known questions nearest to it.

    A model's vote weighs as much as it was right on these neighbours, with one success and one failure added.
    With ``reasons`` a model is shown neighbours' true answers and all predictions instead, and never the
    question itself, and reasons step by step to an answer; if it gives none, the votes decide.

    Shapes:
        ``(num_neighbours + 1) * models`` calls at once, and one more with ``reasons``.

    Raises:
        SettingError: ``num_neighbours`` is outside [0, 1000].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> knows = {"a": "Answer: 4", "b": "Answer: 5", "c": "Answer: 5"}
        >>> says = lambda ask: knows[ask.model] if "2 + 2" in ask.messages[-1].content else knows["a"]
        >>> method = NeighbourVotes(num_neighbours=1)
        >>> method.study([("What is 2 + 2?", "Answer: 4")])
        >>> models = tuple(ModelCard(name=name) for name in knows)
        >>> verdict, asked = rehearse(method.plan(Prompt(id="0", text="Is 2 + 2 odd?"), models), says)
        >>> verdict.text, len(asked)
        ('Answer: 4', 6)

    Differences from the paper:
        Questions in words, there rows of a table, and likeness of words, there of features. The paper's
        language model that reasons over predictions is ``reasons``; by default its weighing is done by
        counting, which takes no call and cannot be talked over. The prompt is of our own wording. Neighbours
        are asked anew for each question; only the paper's abstract was at hand.

    Reference:
        Make Still Further Progress: Chain of Thoughts for Tabular Data Leaderboard (paper 176).
    """

    def __init__(self, *, num_neighbours: int = 4, reasons: bool = False) -> None:
        check_range(type(self).__name__, "num_neighbours", num_neighbours, 0, 1000)
        self.num_neighbours = num_neighbours
        self.reasons = reasons
        self._examples: tuple[tuple[str, str], ...] = ()

    def study(self, examples: Sequence[tuple[str, str]]) -> None:
        self._examples = tuple(examples)

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        asked = question(prompt)
        near = sorted(self._examples, key=lambda one: -alike(one[0], asked))[: self.num_neighbours]
        asks: list[Ask] = [plain(prompt, model.name) for model in models]
        asks += [told(prompt, model.name, known) for known, _ in near for model in models]
        replies = yield asks
        rows = [replies[start : start + len(models)] for start in range(0, len(replies), len(models))]
        truths = [answer_in(worked) for _, worked in near]
        right = [
            sum(_says(row[m], truth) for row, truth in zip(rows[1:], truths, strict=True))
            for m in range(len(models))
        ]
        weights = [(1 + one) / (2 + len(near)) for one in right]
        voters = [m for m in range(len(models)) if rows[0][m].ok]
        voted = plurality([rows[0][m].text for m in voters], [weights[m] for m in voters])
        if not self.reasons or voted.abstained:
            return voted
        parts = [f"{_listed(row)}\ntrue answer: {truth}" for row, truth in zip(rows[1:], truths, strict=True)]
        context = "\n\n".join([*parts, f"now:\n{_listed(rows[0])}"])
        (reply,) = yield [told(prompt, models[0].name, _TASK.format(context=context))]
        return Verdict(good([reply])[0], voted.confidence) if reply.ok else voted

    def most_calls(self, num_models: int) -> int:
        return (self.num_neighbours + 1) * num_models + self.reasons


def _says(reply: Reply, truth: str) -> bool:
    return reply.ok and answer_in(reply.text) == truth


def _listed(row: Sequence[Reply]) -> str:
    said = [answer_in(reply.text) if reply.ok else "nothing" for reply in row]
    return "\n".join(f"predictor {number}: {one}" for number, one in enumerate(said, start=1))
