"""What commands print: names as they are, nothing cut in pipes, a sentence where it cannot be written."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoints import save_tiny

import mixtura
import mixtura.cli
from mixtura.report.screen import screen, show_table

Run = Callable[..., tuple[int, str, str]]
WORDS = "the quick brown fox jumps over the lazy dog. " * 20
ODD = ("[/code]", "[red]", "[bold]x", ":smile:", "a\\[b]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("odd") / "model [bf16]")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_names_in_brackets_are_names(model: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": WORDS, "domain": name}) for name in ODD))
    code, out, err = run(
        "observe", model, "--text", file, "--tokens", "640", "--report", tmp_path / "page.html"
    )
    assert code == 0, err
    assert out.startswith("model [bf16]: 640 tokens of 5 domains\n")
    for name in ODD:
        assert re.search(rf"^{re.escape(name)} +128 ", out, re.MULTILINE), name
    code, out, _ = run("inspect", model)
    assert (code, out.splitlines()[0]) == (0, "model [bf16]")


def test_names_that_are_no_text_are_shown(model: Path, run: Run, tmp_path: Path) -> None:
    file, page = tmp_path / "text.jsonl", tmp_path / "page.html"
    file.write_text(json.dumps({"text": WORDS + "\ud83d", "domain": "half \ud83d"}))
    code, out, err = run("observe", model, "--text", file, "--tokens", "64", "--report", page)
    assert code == 0, err
    assert "half \ufffd" in out
    assert "half \ufffd" in page.read_text(encoding="utf-8")
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    shutil.copytree(model, folder)
    code, out, err = run("inspect", folder)
    assert code == 0, err
    assert out.startswith("caf\\udce9\n")


def test_a_stream_that_knows_few_characters(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    code, _, err = run("inspect")
    assert code == 0, err
    # The multiplication sign between widths.
    assert b"256 \\xd7 128" in written.getvalue()


@pytest.mark.parametrize(
    "arguments", [("methods",), ("inspect",), ("show", "reap"), ("check", "cache", "lru")]
)
def test_nothing_is_cut_or_wrapped_in_a_pipe(arguments: tuple[str, ...], run: Run) -> None:
    wide = run(*arguments)[1]
    assert "…" not in wide
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "40")
        assert run(*arguments)[1] == wide


def test_each_method_is_one_line_in_a_pipe(run: Run) -> None:
    lines = [line.strip() for line in run("methods", "routers")[1].splitlines()]
    for name in mixtura.names("routers"):
        summary = mixtura.methods.header("routers", name).summary
        assert any(re.fullmatch(rf"{name} +{re.escape(summary)}", line) for line in lines), name


def test_words_stay_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := _Terminal())
    assert run("methods", "pruners")[0] == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= 60
    words = " ".join(lines).split()
    for name in mixtura.names("pruners"):
        assert set(mixtura.methods.header("pruners", name).summary.split()) <= set(words)


@pytest.mark.parametrize("arguments", [("methods",), ("show", "reap"), ("inspect",), ("show", "--help")])
def test_no_color_means_no_escapes(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    from typer import rich_utils

    monkeypatch.setattr(rich_utils, "COLOR_SYSTEM", "auto")
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = {}
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys, "stdout", terminal := _Terminal())
        assert run(*arguments)[0] == 0
        shown[no_color] = terminal.getvalue()
    assert "\x1b[" in shown[""]
    assert "\x1b[" not in shown["1"]


def test_a_table_has_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    show_table(screen(), ["name", "size"], [["[x]", "1"], ["long name", "22"]], title="[T]", indent=2)
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "[T]",
        "  name       size",
        "  [x]           1",
        "  long name    22",
    ]


@pytest.mark.parametrize(
    "arguments",
    [("methods",), ("methods", "--json"), ("show", "reap"), ("inspect",), ("--help",), ("--version",)],
)
def test_a_full_disk_behind_stdout_is_a_sentence(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = run(*arguments)
    assert code == 2
    assert err == (
        "error: the disk that is written to is full (No space left on device); "
        "make room and give the command again\n"
    )


@pytest.mark.parametrize("arguments", [("methods",), ("methods", "--json"), ("inspect",), ("--help",)])
def test_a_closed_pipe_is_silent(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "stderr", told := io.StringIO())
        code, _, _ = run(*arguments)
        monkeypatch.undo()
    assert code == 1
    assert told.getvalue() == ""


def test_a_file_on_a_full_disk_is_named(model: Path, run: Run) -> None:
    code, out, err = run("observe", model, "--tokens", "64", "--report", "/dev/full")
    assert (code, out) == (2, "")
    assert err.startswith("error: the disk")
    assert "is full" in err


def test_exit_codes_are_in_the_help(run: Run) -> None:
    told = " ".join(run("--help")[1].split())
    assert "Exit codes: 0 done" in told
    assert "3 understood, but it cannot be had" in told


def test_python_runs_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mixtura", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("mixtura", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"mixtura {mixtura.__version__}\n"


def test_a_paper_is_shown_by_its_title(run: Run) -> None:
    out = run("show", "reap")[1]
    assert "Paper: REAP the Experts: Why Pruning Prevails for One-Shot MoE compression\n" in out
    assert run("show", "lru")[1].splitlines()[1].strip() == "Least recently used"
