"""Two debaters with opposite sides, and a judge who sees only what they say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import final

from mixtura.errors import UserError, check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import question, told
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {"paper": 196, "title": "Debate Helps Supervise Unreliable Experts", "tags": ["needs:options"]}
_ARGUE = (
    "Question: {question}\n\nSource:\n{source}\n\nArgue in a few sentences that the answer is: {side}. "
    "Your opponent argues for: {other}. Quote the source word for word as <quote>...</quote>; a judge "
    "who cannot see it is told which quotes are real.\n\nDebate so far:\n{transcript}"
)
_JUDGE = (
    "Question: {question}\n\nDebater A says: {first}\nDebater B says: {second}\n\nDebate:\n"
    "{transcript}\n\nQuotes marked <real> stand in the source, those marked <invented> do not. Who is "
    "right? End with one line: 'A' or 'B'."
)
_MARKS = re.compile(r"<\s*/?\s*(?:real|invented)\s*>", re.IGNORECASE)
_QUOTE = re.compile(r"<quote>(.*?)</quote>", re.DOTALL)


@final
class Debate(Aggregator):
    """Let two debaters who see a source argue for two answers before a judge who does not see it.

    Quotes are checked against the source word for word and marked for the judge. Every debate is held twice
    with the sides exchanged, so that a judge who prefers whoever speaks first says nothing: the answer must
    win both times, else there is none.

    A prompt has the labels ``source``, ``first`` and ``second``: the text and the two answers. The first
    model debates, the last one judges.

    Shapes:
        Two debates of ``2 * num_rounds`` turns and a verdict each, both at once.

    Raises:
        SettingError: ``num_rounds`` is outside [1, 16].
        UserError: a prompt lacks a label.

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> labels = {"source": "The cat sat.", "first": "sat", "second": "ran"}
        >>> judge = lambda ask: "A" if "A says: sat" in ask.messages[-1].content else "B"
        >>> says = lambda ask: judge(ask) if ask.model == "judge" else "<quote>cat sat</quote>"
        >>> models = ModelCard(name="a"), ModelCard(name="judge")
        >>> plan = Debate(num_rounds=1).plan(Prompt(id="0", text="It did what?", labels=labels), models)
        >>> rehearse(plan, says)[0]
        Verdict(text='sat', confidence=1.0, abstained=False)

    Differences from the paper:
        Only the abstract was read: there, people debate before people, on passages of QuALITY, beside
        consultancy with one adviser, which is left out. Held twice with sides exchanged, 3 rounds, and quotes
        checked by their words are mixtura's. Debaters write in turn, A first.

    Reference:
        Debate Helps Supervise Unreliable Experts (paper 196).
    """

    def __init__(self, *, num_rounds: int = 3) -> None:
        check_range(type(self).__name__, "num_rounds", num_rounds, 1, 16)
        self.num_rounds = num_rounds

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        missing = [key for key in ("source", "first", "second") if not prompt.labels.get(key)]
        if missing:
            raise UserError(f"debate needs the label {missing[0]!r} on a prompt: a source and two answers")
        source, asked = prompt.labels["source"], question(prompt)
        pairs = [(prompt.labels["first"], prompt.labels["second"])]
        pairs.append(pairs[0][::-1])
        said: list[list[str]] = [[], []]
        for turn in range(2 * self.num_rounds):
            asks = []
            for (first, second), so_far in zip(pairs, said, strict=True):
                side, other = (first, second) if turn % 2 == 0 else (second, first)
                text = _ARGUE.format(
                    question=asked, source=source, side=side, other=other, transcript=_joined(so_far)
                )
                asks.append(told(prompt, models[0].name, text))
            replies = yield asks
            for so_far, reply in zip(said, replies, strict=True):
                so_far.append(f"{'AB'[turn % 2]}: {marked(reply.text, source)}")
        replies = yield [
            told(prompt, models[-1].name,
                 _JUDGE.format(question=asked, first=one, second=two, transcript=_joined(so_far)))
            for (one, two), so_far in zip(pairs, said, strict=True)
        ]  # fmt: skip
        won = [_winner(reply.text, pair) for reply, pair in zip(replies, pairs, strict=True)]
        if won[0] is None or won[0] != won[1]:
            return Verdict("", 0.5, abstained=True)
        return Verdict(won[0], 1.0)

    def most_calls(self, num_models: int) -> int:
        return 2 * (2 * self.num_rounds + 1)


def marked(text: str, source: str) -> str:
    """A speech with its quotes marked by whether they stand in the source, spaces aside."""
    plain = " ".join(source.split())

    def mark(found: re.Match[str]) -> str:
        words = " ".join(found.group(1).split())
        kind = "real" if words and words in plain else "invented"
        return f"<{kind}>{words}</{kind}>"

    # A debater who writes the judge's marks himself is not believed, nor one who puts them together of parts.
    while (without := _MARKS.sub("", text)) != text:
        text = without
    # On one line, so that nobody can write a turn of the other's.
    return " ".join(_QUOTE.sub(mark, text).split())


def _joined(said: Sequence[str]) -> str:
    return "\n".join(said) or "(nothing yet)"


def _winner(text: str, pair: tuple[str, str]) -> str | None:
    found = re.findall(r"\b([AB])\b", text)
    return pair["AB".index(found[-1])] if found else None
