"""What aggregators share: questions as messages, answers taken from texts, and votes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from mixtura.types.asking import Ask, Reply, Verdict
from mixtura.types.models import Message, Prompt

_BOXED: Final = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_SAID: Final = re.compile(
    r"(?:final answer|answer)(?:\s+is|\s*[:=])\s*\(?(.+?)\)?\s*(?:\.\s|\.?$)", re.I | re.M
)


def plain(prompt: Prompt, model: str, *, temperature: float = 0.0, sample: int = 0) -> Ask:
    """The user's own prompt to a model."""
    return Ask(
        model=model, messages=prompt.conversation(), temperature=temperature, sample=sample,
        max_tokens=prompt.max_tokens, plain=True,
    )  # fmt: skip


def told(prompt: Prompt, model: str, text: str, *, temperature: float = 0.0, sample: int = 0) -> Ask:
    """A text of the plan's to a model, after what the conversation says before its last message."""
    before = prompt.conversation()[:-1]
    return Ask(
        model=model, messages=(*before, Message("user", text)), temperature=temperature, sample=sample,
        max_tokens=prompt.max_tokens,
    )  # fmt: skip


def question(prompt: Prompt) -> str:
    """What the user asks: the last message."""
    return prompt.conversation()[-1].content


def answer_in(text: str) -> str:
    """What a text gives as its answer, so that two texts can be compared: the last boxed one, else the last
    that is called the answer, else the whole text; without case and spaces around.

    >>> answer_in("So the answer is (B)."), answer_in("x = \\\\boxed{4}"), answer_in(" Paris ")
    ('b', '4', 'paris')
    """
    found = _BOXED.findall(text) or _SAID.findall(text)
    return " ".join((found[-1] if found else text).split()).strip(" .").casefold()


def is_concluded(text: str) -> bool:
    """Whether a text says what the answer is.

    >>> is_concluded("so \\\\boxed{2}"), is_concluded("Answer: 2"), is_concluded("divide by 2")
    (True, True, False)
    """
    return bool(_BOXED.search(text) or _SAID.search(text))


def good(replies: Iterable[Reply]) -> list[str]:
    """The texts of replies that are answers."""
    return [reply.text for reply in replies if reply.ok]


def plurality(texts: Sequence[str], weights: Sequence[float] | None = None) -> Verdict:
    """The answer that most texts give, in the words of the first of them; of equals the first asked.

    Its confidence is its share of the votes. No text is no answer.

    >>> plurality(["a", "B", "b"])
    Verdict(text='B', confidence=0.6666666666666666, abstained=False)
    """
    if not texts:
        return Verdict("", 0.0, abstained=True)
    votes: dict[str, float] = {}
    first: dict[str, str] = {}
    for text, weight in zip(texts, weights or [1.0] * len(texts), strict=True):
        key = answer_in(text)
        votes[key] = votes.get(key, 0.0) + weight
        first.setdefault(key, text)
    best = max(votes, key=lambda key: votes[key])
    total = sum(votes.values())
    return Verdict(first[best], votes[best] / total if total > 0 else 0.0)


def numbered_list(texts: Sequence[str]) -> str:
    """Texts one after the other with numbers, as prompts show them."""
    return "\n\n".join(f"[{number}]\n{text}" for number, text in enumerate(texts, start=1))


def says_yes(text: str) -> bool:
    """Whether a verdict says yes: its last yes or no as a word is a yes.

    >>> says_yes("No doubt: YES."), says_yes("I cannot tell"), says_yes("yes ... in the end: no")
    (True, False, False)
    """
    words = re.findall(r"\b(yes|no)\b", text.casefold())
    return bool(words) and words[-1] == "yes"


SYNTHESIS: Final = (
    "Several answers to a question follow. Some may be wrong. Judge them and write one answer of your own, "
    "better than any of them; do not mention them.\n\nQuestion:\n{question}\n\n"
    "Answers:\n{answers}\n\nYour answer:"
)


def alike(one: str, two: str) -> float:
    """How like two texts are: the cosine of their counts of words.

    >>> alike("a b", "b a"), alike("a", "b"), alike("", "a")
    (1.0, 0.0, 0.0)
    """
    counts = [Counter(re.findall(r"\w+", text.casefold())) for text in (one, two)]
    product = sum(number * counts[1][word] for word, number in counts[0].items())
    norms = [math.sqrt(sum(number**2 for number in count.values())) for count in counts]
    return round(product / (norms[0] * norms[1]), 12) if all(norms) else 0.0
