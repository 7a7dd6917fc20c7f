"""`mixtura generate`: text on stdout, how it went on stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoints import run_fresh, run_mixtura, tiny_tokenizer
from tiny_plans import save_packed
from typer.testing import CliRunner

from mixtura.cli import build_app
from mixtura.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, packed = save_packed(tmp_path_factory.mktemp("generate"), "qwen3_moe")
    tiny_tokenizer().save_pretrained(packed)
    return packed


@pytest.mark.slow
def test_text_goes_to_stdout_and_speed_to_stderr(model: Path) -> None:
    plain = run_mixtura("generate", str(model), "one two", "--max-new-tokens", "6")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.endswith("\n")
    assert "7 tokens read" in plain.stderr
    assert "tokens/s" in plain.stderr
    result = run_mixtura("generate", str(model), "one two", "--max-new-tokens", "6", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["model"] == "packed"
    assert values["num_prompt_tokens"] == 7
    assert values["num_new_tokens"] <= 6
    assert values["text"].strip() == plain.stdout.strip()
    assert values["peak_bytes"] > 100 << 20


@pytest.mark.slow
def test_without_a_model_the_specimen_answers() -> None:
    result = run_fresh("generate", "def add(a, b):", "--max-new-tokens", "4", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["model"] == "specimen"


def test_a_directory_without_a_prompt_is_named(model: Path) -> None:
    result = CliRunner().invoke(build_app(), ["generate", str(model)])
    assert isinstance(result.exception, UserError)
    assert "give the text to continue" in str(result.exception)


def test_help_shows_both_ways() -> None:
    result = CliRunner().invoke(build_app(), ["generate", "--help"])
    assert result.exit_code == 0
    assert "[MODEL] PROMPT" in result.output
    assert "mixtura generate" in result.output


@pytest.mark.slow
def test_bits_are_for_nested_experts(model: Path) -> None:
    result = run_mixtura("generate", str(model), "one two", "--bits", "4")
    assert result.returncode == 2
    assert "write it with the quantizer nested" in result.stderr
