"""A user's files: what is read, and one clear sentence for everything that cannot be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mixtura.data.reading import read
from mixtura.data.records import TextError
from mixtura.errors import MixturaWarning

LONG = "Some words of text.\n" * 20


def write(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = template
    return tokenizer


def test_a_file_is_one_document_named_by_its_stem(tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    file.write_text(LONG + "Ünïcode")
    (document,) = read(file)
    assert (document.domain, document.name) == ("novel", "novel.txt")
    assert document.text.endswith("Ünïcode")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf" + LONG.encode())
    assert read(file)[0].text == LONG


def test_sub_directories_are_domains_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("law/a.txt", "law/deep/b.txt", "code/c.py", "top.md", ".git/config", "law/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LONG)
    found = [(d.domain, d.name) for d in read(str(tmp_path))]
    assert found == [
        ("code", "code/c.py"),
        ("law", "law/a.txt"),
        ("law", "law/deep/b.txt"),
        ("top", "top.md"),
    ]


def test_jsonl_of_each_shape(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mixed.jsonl",
        {"text": LONG},
        {"prompt": "2 + 2 =", "answer": "4", "domain": "sums"},
        {"prompt": "Why?\n", "answer": "So."},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    )
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    first, second, third, fourth = read(file, chat_tokenizer(template))
    assert (first.text, first.domain, first.name) == (LONG, "mixed", "mixed.jsonl:1")
    assert (second.text, second.domain) == ("2 + 2 =\n4", "sums")
    assert (second.prompt, second.answer) == ("2 + 2 =\n", "4")
    assert third.text == "Why?\nSo."
    assert fourth.text == "<user>Hello<assistant>Hi"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"bad.jsonl, line 2 is not JSON"),
        ("[1]", r"bad.jsonl, line 2 is not a JSON object"),
        ('{"body": "x"}', r'line 2 has .body.; give "text", or "prompt" with "answer", or .* or "messages"'),
        ("{}", "line 2 has no keys; give"),
        ("[" * 100_000, "line 2 is not JSON .nested too deeply"),
        ('{"text": "x", "domain": {}}', r'"domain" in .*line 2 must be a string, got dict'),
        ('{"instruction": "x", "output": 3}', r'"output" in .*line 2 must be a string, got int'),
        ('{"instruction": "x", "input": 3, "output": "y"}', r'"input" in .*line 2 must be a string'),
        ('{"conversations": [{"from": "martian", "value": "x"}]}', r"line 2 has a turn from 'martian'"),
        ('{"conversations": "x"}', r'"conversations" in .*line 2 must be a list'),
        ('{"conversations": ["x"]}', r'"conversations" in .*line 2 must be a list'),
        ('{"prompt": [], "completion": []}', r'"prompt" in .*line 2 must be a list'),
        ('{"text": 3}', r'"text" in .*line 2 must be a string, got int'),
        ('{"prompt": "x", "answer": null}', r'"answer" in .*line 2 must be a string'),
        ('{"messages": []}', r'"messages" in .*line 2 must be a list'),
        ('{"messages": [{"role": 1}]}', r'"messages" in .*line 2 must be a list'),
        ('{"messages": [{"role": "user", "content": "x"}]}', r"need a model with a chat template"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"text": LONG}) + "\n" + line + "\n")
    with pytest.raises(TextError, match=message):
        read(file, chat_tokenizer(None))


def test_a_template_that_refuses_is_reported(tmp_path: Path) -> None:
    file = write(tmp_path / "chat.jsonl", {"messages": [{"role": "tool", "content": "x"}]})
    with pytest.raises(TextError, match=r"does not take the messages in .*line 1: no tools"):
        read(file, chat_tokenizer("{{ raise_exception('no tools') }}"))


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def test_records_of_training_tools(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    asked, told = [{"role": "user", "content": "Hello"}], [{"role": "assistant", "content": "Hi"}]
    file = write(
        tmp_path / "tools.jsonl",
        {"text": LONG, "instruction": "left out", "output": "too"},
        {"prompt": "The sky is", "completion": " blue."},
        {"prompt": "Why?", "completion": "So."},
        {"prompt": asked, "completion": told},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say so.", "input": "", "output": "So."},
        {"conversations": turns},
        {"system": "Be kind.", "conversations": turns, "domain": "talk"},
        {"conversations": [{"role": "user", "content": "Hello"}]},
    )
    found = read(file, chat_tokenizer(TEMPLATE))
    assert [one.text for one in found] == [
        LONG,
        "The sky is blue.",
        "Why?\nSo.",
        "<user>Hello<assistant>Hi",
        "Add.\n\n1 and 2\n3",
        "Say so.\nSo.",
        "<user>Hello<assistant>Hi",
        "<system>Be kind.<user>Hello<assistant>Hi",
        "<user>Hello",
    ]
    assert [(one.prompt, one.answer) for one in found[1:6]] == [
        ("The sky is", " blue."),
        ("Why?\n", "So."),
        (None, None),
        ("Add.\n\n1 and 2\n", "3"),
        ("Say so.\n", "So."),
    ]
    assert {one.domain for one in found} == {"tools", "talk"}


def test_a_list_of_records_and_json_that_is_text(tmp_path: Path) -> None:
    records = [{"instruction": "Say.", "output": LONG}, {"instruction": "More.", "output": "No."}]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    settings = json.dumps([{"indent": 4, "words": LONG}])
    (tmp_path / "settings.json").write_text(settings)
    first, second, third = read(tmp_path)
    assert (first.prompt, first.answer, first.name) == ("Say.\n", LONG, "alpaca.json:1")
    assert second.text == "More.\nNo."
    assert (third.text, third.prompt) == (settings, None)
    (tmp_path / "alpaca.json").write_text(json.dumps([*records, {"instruction": "alone"}]))
    with pytest.raises(TextError, match=r"alpaca.json, entry 3 has .instruction.; give"):
        read(tmp_path)


def test_other_endings_of_lines_of_records(tmp_path: Path) -> None:
    for ending in ("JSONL", "ndjson", "jsonlines"):
        file = write(tmp_path / f"lines.{ending}", {"text": LONG})
        assert read(file)[0].text == LONG


def test_what_is_no_text_in_a_directory_is_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LONG)
    (tmp_path / "latin.txt").write_bytes("Käse ".encode("latin-1") * 99)
    (tmp_path / "zeros.bin").write_bytes(b"text\0" * 100)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / f"pictures/{number}.png").write_bytes(b"\x89PNG\xff" * 100)
    with pytest.warns(MixturaWarning, match="latin.txt, pictures/0.png, pictures/1.png and 2 more") as said:
        found = read(tmp_path)
    assert len(said) == 1
    assert [one.name for one in found] == ["a.txt"]


def test_halves_of_surrogate_pairs_are_replaced(tmp_path: Path) -> None:
    file = write(
        tmp_path / "halves.jsonl",
        {"text": LONG + "\ud83d", "domain": "\udc80x"},
        {"prompt": "a\ud83d", "answer": "\ude00b"},
        {"messages": [{"role": "user", "content": "\ud83d\ude00\ud83d"}]},
    )
    first, second, third = read(file, chat_tokenizer(TEMPLATE))
    assert (first.text, first.domain) == (LONG + "\ufffd", "\ufffdx")
    assert (second.prompt, second.answer) == ("a\ufffd\n", "\ufffdb")
    assert third.text == "<user>\U0001f600\ufffd"
    for one in (first, second, third):
        (one.text + one.domain + one.name).encode()


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_text(LONG)
    assert read(tmp_path)[0].domain == "caf\ufffd"


def test_a_text_where_its_path_belongs(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"no text can be read at .*give a path"):
        read("some words " * 1000)
    with pytest.raises(TextError, match="is a device"):
        read("/dev/zero")


def test_missing_empty_short_and_binary(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no text at"):
        read(tmp_path / "absent.txt")
    with pytest.raises(TextError, match="holds no files"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(TextError, match="is empty; at least 200"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(TextError, match="holds 9 characters"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"\x89PNG\xff" * 100)
    with pytest.raises(TextError, match=r"holds no file of UTF-8 text: .*a.txt is not UTF-8 text \(byte 0\)"):
        read(tmp_path)
    with pytest.raises(TextError, match=r"a.txt is not UTF-8 text \(byte 0\)"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"text\0" * 100)
    with pytest.raises(TextError, match=r"is binary \(byte 4 is zero\)"):
        read(tmp_path)
