"""What cannot be done is refused in one sentence before anything is written."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import run_mixtura, save_tiny

from mixtura import UserError, compress

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "nothing to do"),
    ({"prune": "reap"}, "--prune needs --keep"),
    ({"keep": 0.5}, "give one of these as well"),
    ({"prune": "reap", "keep": 0.0}, "above 0 and below 1, got 0"),
    ({"prune": "reap", "keep": 1.5}, "above 0 and below 1, got 1.5"),
    ({"prune": "reap", "keep": 0.2}, "leaves 1 expert of 8, and routing needs at least 2.*--keep 0.25"),
    ({"prune": "raep", "keep": 0.5}, "did you mean 'reap'"),
    ({"quantize": "gtpq"}, "did you mean 'gptq'"),
    ({"quantize": "gptq", "bits": 99}, "bits of .* must be"),
    ({"quantize": "gptq", "bits": 2.5}, "bits of Gptq must be int, got 2.5"),
    ({"bits": 3}, "--quantize METHOD as well"),
    ({"rest_bits": 3}, "--rest-bits is 8 or 4"),
    ({"rest_bits": 8, "to_format": "gguf"}, "--type attention=q8_0"),
    ({"quantize": "gptq", "settings": {"quantise": {"bits": 3}}}, "did you mean 'quantize'"),
    ({"quantize": "gptq", "settings": {"prune": {"x": 3}}}, "settings of --prune are given"),
    ({"quantize": "gptq", "settings": {"quantize": {"grup_size": 3}}}, "did you mean 'group_size'"),
    ({"quantize": "gptq", "to_format": "ggfu"}, "did you mean 'gguf'"),
    ({"quantize": "gptq", "to_format": "gguf"}, "with --type"),
    ({"quantize": "gptq", "types": ["q4_k"]}, "--format gguf as well"),
    ({"quantize": "gptq", "length": 1}, "--length at least 2"),
    ({"quantize": "gptq", "servable": True}, "--servable"),
    ({"merge": "m_smoe", "keep": 0.5, "servable": True}, "--servable rounds what --prune leaves"),
    ({"merge": "m_smoe", "keep": 0.1}, "leaves 0 experts of 8, and routing needs at least 1"),
    ({"merge": "m_smoe", "keep": 0.5, "to_format": "gguf"}, "no GGUF file can say"),
    ({"merge": "msmoe", "keep": 0.5}, "did you mean 'm_smoe'"),
    ({"prune": "reap", "merge": "average", "keep": 0.5}, "contradict each other"),
]


@pytest.mark.parametrize(("choices", "said"), BAD, ids=[said for _, said in BAD])
def test_choices(choices: dict[str, Any], said: str, source: Path, text: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    with pytest.raises(UserError, match=said):
        compress(source, tmp_path / "out", text=text, **choices)
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == before


def test_a_text_that_is_too_short(source: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("abcdefgh")
    with pytest.raises(UserError, match="short"):
        compress(source, tmp_path / "out", quantize="gptq", text=short)
    short.write_text("abcdefgh" * 40)
    with pytest.raises(UserError, match=r"fewer than 8 of its 8 tokens on average.*at least 32 tokens"):
        compress(source, tmp_path / "out", quantize="gptq", text=short, tokens=8, length=8)
    assert list(tmp_path.iterdir()) == [short]


def test_groups_of_a_router(text: Path, tmp_path: Path) -> None:
    grouped = save_tiny(tmp_path / "grouped", "deepseek_v3")
    with pytest.raises(UserError, match="routing needs at least"):
        compress(grouped, tmp_path / "out", prune="reap", keep=0.13, text=text)


def test_places(source: Path, text: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(source, copied)
    with pytest.raises(UserError, match="lies inside it"):
        compress(copied, copied / "out", quantize="gptq", text=text)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(UserError, match="never overwritten"):
        compress(source, tmp_path / "there", quantize="gptq", text=text)
    assert (tmp_path / "there" / "file").read_text() == "mine"
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        compress(source, tmp_path / "out", quantize="gptq", text=tmp_path / "nowhere.txt")


def test_a_disk_without_room(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, (1 << 30) - 1000, 1000))
    with pytest.raises(UserError, match=r"has 1000 B free, and writing out takes about .* free .* there"):
        compress(source, tmp_path / "out", quantize="gptq", text=text)
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_in_one_sentence(source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for arguments, said in {
        ("--quantize", "gptq", "--bits", "1"): "bits of",
        ("--quantize", "gptq", "--set", "group_size=3"): "--set takes METHOD.NAME=VALUE",
        ("--quantize", "gptq", "--set", 'quantize.group_size="x"'): "group_size of Gptq must be int",
    }.items():
        done = run_mixtura("compress", str(source), "--out", out, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
