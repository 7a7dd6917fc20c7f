"""What decoders share: answers in texts, votes, choices by score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mixtura.methods.decoders import Branch, Candidate, Prompt

# The temperature of branches that would be all alike at 0.
DRAWN_AT = 0.8


def several(prompt: Prompt, n: int) -> tuple[Branch, ...]:
    """So many plain branches; they are drawn at 0.8 where the user asked for no temperature."""
    temperature = prompt.temperature or (DRAWN_AT if n > 1 else 0.0)
    return (Branch(temperature=temperature),) * n


def answer_of(text: str) -> str:
    """What a text answers: its last line that has words, after a colon if it has one, in lower case.

    >>> answer_of("3 + 4 = 7\\nAnswer: 7.\\n")
    '7'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    head, colon, tail = last.rpartition(":")
    return (tail if colon and tail.strip() else head or last).strip(" .:*`\"'").lower()


def most_voted(answers: Sequence[str], weights: Sequence[float] | None = None) -> int:
    """The first text that gives the answer with most votes; among equals, the answer that came first.

    >>> most_voted(["a", "b", "b"]), most_voted(["a", "b", "b"], [3.0, 1.0, 1.0])
    (1, 0)
    """
    votes: Counter[str] = Counter()
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        votes[answer] += weight  # type: ignore[assignment]
    best = max(votes.values())
    return next(place for place, answer in enumerate(answers) if votes[answer] == best)


def best_place(scores: Sequence[float]) -> int:
    """The place of the highest score, the first of equals.

    >>> best_place([0.1, 0.9, 0.9])
    1
    """
    return max(range(len(scores)), key=lambda place: (scores[place], -place))


def mean(values: Sequence[float]) -> float:
    """The mean; minus infinity of nothing, so that it is chosen last."""
    return sum(values) / len(values) if values else float("-inf")


def score_of(candidate: Candidate) -> float:
    """The verifier's last word, else the mean log-probability of the tokens."""
    if candidate.verdicts:
        return candidate.verdicts[-1]
    return mean(candidate.log_probabilities)
