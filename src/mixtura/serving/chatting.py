"""A chat in the terminal: lines in, answers out as they come, and a conversation that is kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, final

from mixtura.data.shapes import word_chat
from mixtura.data.tokens import encode_text, num_embeddings_of
from mixtura.errors import UserError, suggest
from mixtura.serving.engine.loop import Engine
from mixtura.serving.engine.records import Asked, Piece, Sampling

COMMANDS: Final = {
    "/help": "what there is",
    "/reset": "begin a new conversation; what /system said stays",
    "/system TEXT": "what the model is told before everything; without TEXT, nothing",
    "/undo": "take back the last question and its answer",
    "/again": "answer the last question anew",
    "/save FILE": "write the conversation as JSON, which /load FILE reads",
    "/load FILE": "go on with a conversation that was saved",
    "/quit": "leave, as Ctrl-D does",
}
_WAIT_S: Final = 0.1

Show = Callable[[str], None]


@final
@dataclass(slots=True)
class Conversation:
    """What was said, and what the model is told before it."""

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat template takes them."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        return told + self.turns

    def save(self, file: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        beside = file.with_name(f".{file.name}.part")
        try:
            beside.write_text(json.dumps({"messages": self.messages}, indent=1) + "\n", encoding="utf-8")
            beside.replace(file)
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}; give another file") from None

    @staticmethod
    def load(file: Path) -> Conversation:
        """Read what `save` wrote.

        Raises:
            UserError: the file cannot be read, or is something else.
        """
        wrong = UserError(f'{file} is no saved conversation: {{"messages": [...]}} with "role" and "content"')
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        except ValueError:
            raise wrong from None
        messages = found.get("messages") if isinstance(found, dict) else None
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise wrong
        system = "".join(one["content"] for one in messages if one["role"] == "system")
        turns = [{"role": m["role"], "content": m["content"]} for m in messages if m["role"] != "system"]
        return Conversation(system, turns)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    )


@final
class Chat:
    """One conversation with a model.

    Args:
        engine: runs it.
        tokenizer: the model's, with a chat template.
        sampling: how answers are drawn.
        max_new_tokens: of an answer.
        show: told what is to be seen.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, sampling: Sampling, max_new_tokens: int, show: Show
    ) -> None:
        self.conversation = Conversation()
        self._engine = engine
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._most = max_new_tokens
        self._show = show

    def take(self, line: str) -> bool:
        """Do what a line says; returns whether the chat goes on.

        Raises:
            UserError: it cannot be done; the conversation is as it was.
        """
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self._ask(line)
            return True
        name, _, rest = line.partition(" ")
        known = {command.split()[0]: command for command in COMMANDS}
        if name not in known:
            raise UserError(f"there is no {name}; {suggest(name, known)}")
        if name == "/quit":
            return False
        self._command(name, rest.strip())
        return True

    def _command(self, name: str, rest: str) -> None:
        talk = self.conversation
        if name == "/help":
            self._show("".join(f"{command:<14} {what}\n" for command, what in COMMANDS.items()))
        elif name == "/reset":
            talk.turns.clear()
        elif name == "/system":
            talk.system = rest
        elif name in ("/save", "/load"):
            if not rest:
                raise UserError(f"give {name} a file")
            if name == "/save":
                talk.save(Path(rest).expanduser())
            else:
                self.conversation = Conversation.load(Path(rest).expanduser())
        else:
            question = self._take_back()
            if name == "/again":
                self._ask(question)

    def _take_back(self) -> str:
        """The last question, which is no longer there, nor what came after it."""
        turns = self.conversation.turns
        places = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
        if not places:
            raise UserError("nothing was asked yet")
        question = turns[places[-1]]["content"]
        del turns[places[-1] :]
        return question

    def _ask(self, question: str) -> None:
        """Ask, show the answer as it comes, and keep both; Ctrl-C keeps what there is of the answer."""
        asked = {"role": "user", "content": question}
        prompt = self._prompt([*self.conversation.messages, asked])
        text = self._answer(prompt)
        self.conversation.turns += [asked, {"role": "assistant", "content": text}]

    def _prompt(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        worded = word_chat(messages, self._tokenizer, "this conversation", add_generation_prompt=True)
        vocabulary = num_embeddings_of(self._engine.model.config)
        return tuple(encode_text(worded, self._tokenizer, vocabulary, begin=False))

    def _answer(self, prompt: tuple[int, ...]) -> str:
        pieces: SimpleQueue[Piece] = SimpleQueue()
        room = self._engine.limits.context - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, as many as the context; /reset or /undo"
            )
        asked = Asked(prompt=prompt, max_new_tokens=min(self._most, room), sampling=self._sampling)
        take_back = self._engine.submit([asked], [pieces.put])
        text, ended = "", threading.Event()
        while not ended.is_set():
            try:
                piece = pieces.get(timeout=_WAIT_S)
            except Empty:
                continue
            except KeyboardInterrupt:
                take_back()
                continue
            if piece.error is not None:
                raise piece.error
            text += piece.text
            self._show(piece.text)
            if piece.is_last:
                ended.set()
        self._show("\n")
        return text
