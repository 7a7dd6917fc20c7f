"""`mixtura chat`: a conversation in a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving_helpers import PATIENCE_S, SPECIMEN

from mixtura.errors import UserError
from mixtura.serving.chatting import Chat, Conversation
from mixtura.serving.engine.records import Sampling
from mixtura.serving.opening import Opened, Serving, open_model


@pytest.fixture(scope="module")
def opened() -> Opened:
    return open_model(SPECIMEN, Serving(context=200, running=1, waiting=1))


def talk(opened: Opened) -> tuple[Chat, list[str]]:
    shown: list[str] = []
    chat = Chat(opened.engine, opened.tokenizer, Sampling(temperature=0), 60, shown.append)
    return chat, shown


def test_a_conversation_goes_on_is_taken_back_and_kept(opened: Opened, tmp_path: Path) -> None:
    chat, shown = talk(opened)
    assert chat.take("What is 17 + 28?")
    answer = "".join(shown)
    assert "45" in answer
    assert chat.conversation.turns[1]["content"] == answer.removesuffix("\n")
    chat.take("/again")
    assert len(chat.conversation.turns) == 2
    file = tmp_path / "talk.json"
    chat.take(f"/save {file}")
    assert json.loads(file.read_text())["messages"] == chat.conversation.messages
    chat.take("/undo")
    assert not chat.conversation.turns
    chat.take(f"/load {file}")
    assert len(chat.conversation.turns) == 2
    chat.take("/system Be brief.")
    chat.take("/reset")
    assert chat.conversation.messages == [{"role": "system", "content": "Be brief."}]
    shown.clear()
    chat.take("/help")
    assert "/save FILE" in "".join(shown)
    assert not chat.take("/quit")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/sav x", "did you mean '/save'"),
        ("/save", "a file"),
        ("/undo", "nothing was asked"),
        ("/load missing.json", "cannot read"),
        ("/save missing/x.json", "cannot write"),
        ("word " * 300, "context"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(opened: Opened, line: str, said: str) -> None:
    chat, _ = talk(opened)
    with pytest.raises(UserError, match=said):
        chat.take(line)
    assert chat.conversation == Conversation()


def test_another_file_is_no_conversation(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"messages": [{"role": "king"}]}')
    with pytest.raises(UserError, match="no saved conversation"):
        talk(opened)[0].take(f"/load {tmp_path / 'x.json'}")


@pytest.mark.slow
def test_the_command_answers_lines_that_are_piped_to_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mixtura", "chat", "--temperature", "0", "--context", "128"],
        input="What is 17 + 28?\n/nothing\n/quit\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "45" in done.stdout
    assert "there is no /nothing" in done.stderr
