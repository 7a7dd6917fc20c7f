"""The records of text: a document of a domain, and a task whose answer can be checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from mixtura.errors import UserError


@final
class TextError(UserError):
    """A text that cannot be used: missing, empty, too short, not UTF-8 or malformed."""


def readable(text: str) -> str:
    """A string with U+FFFD in place of each half of a surrogate pair, which is no text and has no tokens.

    JSON can write such halves and the shell's arguments can hold them; two that belong together are joined.

    >>> readable("a\\ud83d"), readable("\\ud83d" + "\\ude00") == "\\U0001f600"
    ('a\ufffd', True)
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@final
@dataclass(frozen=True, slots=True)
class Document:
    """A piece of text and the domain it belongs to.

    `prompt` and `answer` are set for tasks and for question-and-answer files: `text` is then the
    prompt followed by the expected completion.
    """

    text: str
    domain: str
    name: str
    prompt: str | None = None
    answer: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Task:
    """A question with worked steps and an answer that a program can check.

    `completion` is what a perfect model writes after `prompt`: the steps, then a last line made of
    `answer_label` and the answer.
    """

    task: str
    language: str
    prompt: str
    steps: str
    answer_label: str
    answer: str

    @property
    def completion(self) -> str:
        """The worked steps and the line with the answer."""
        return f"{self.steps}\n{self.answer_label}: {self.answer}"

    def is_correct(self, completion: str) -> bool:
        """Whether the last answer line of a completion holds exactly the right answer.

        The steps before it are not judged.
        """
        label = f"{self.answer_label}:"
        found = [line for line in completion.splitlines() if line.startswith(label)]
        return bool(found) and found[-1].removeprefix(label).strip() == self.answer

    def document(self) -> Document:
        """The task as text of the domain "tasks"."""
        return Document(
            text=self.prompt + self.completion,
            domain="tasks",
            name=f"{self.task}/{self.language}",
            prompt=self.prompt,
            answer=self.answer,
        )
