"""Another budget or allowed loss goes on from what has been measured; defaults that cannot be are mended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoints import save_tiny

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.errors import BudgetError, OutputError
from mixtura.fitting import Request, fit
from mixtura.fitting.budget import allowance
from mixtura.running.memory import account

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, dict[str, bytes]]:
    """A fit that was refused for its loss, and what its work directory holds."""
    place = tmp_path_factory.mktemp("again")
    source = save_tiny(place / "tiny")
    request = Request(model=source, out=place / "out", max_kl=1e-12)
    with pytest.raises(BudgetError, match="costs"):
        fit(request)
    return request, held(place / "out.work")


def held(work: Path) -> dict[str, bytes]:
    files = (path for path in work.rglob("*") if path.is_file())
    return {str(path.relative_to(work)): path.read_bytes() for path in files}


def measured(work: dict[str, bytes]) -> list[str]:
    """Keys of every line, in order."""
    return [json.loads(line)["key"] for line in work["measured.jsonl"].splitlines() if line.strip()]


def test_another_budget_measures_nothing_twice(refused: tuple[Request, dict[str, bytes]]) -> None:
    request, before = refused
    whole = account(request.model, 64)
    smaller = replace(
        request, model_memory_bytes=whole.total_bytes - whole.weights_bytes * 6 // 10, max_kl=0.0
    )
    said: list[str] = []
    with pytest.raises(BudgetError):
        fit(smaller, said.append)
    after = held(request.out.with_name("out.work"))
    for name in ("prices.safetensors", "reference.safetensors", "settings.json"):
        assert after[name] == before[name]
    keys = measured(after)
    assert keys[: len(measured(before))] == measured(before)
    assert len(set(keys)) == len(keys)
    assert len(keys) > len(measured(before))
    assert not any("observing" in line or "original" in line for line in said)


def test_what_changes_a_measurement_is_refused_by_name(refused: tuple[Request, dict[str, bytes]]) -> None:
    request, _ = refused
    with pytest.raises(OutputError, match="seed was 0, is now 1"):
        fit(replace(request, seed=1))


def test_a_context_that_only_takes_memory_may_change(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    view = open_checkpoint(source)
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.fitting.run import _settings
    from mixtura.fitting.texts import texts_of

    request = Request(model=source, out=tmp_path / "out")
    settings = []
    for context in (4096, 2048, 256):
        allowed = allowance(replace(request, context=context), view, 0)
        texts = texts_of(request, context, load_tokenizer(source))
        settings.append(dict(_settings(request, view, allowed, texts)))
    assert settings[0] == settings[1]
    assert settings[0] != settings[2]


def test_a_context_beyond_the_models_is_said(tmp_path: Path) -> None:
    view = open_checkpoint(save_tiny(tmp_path / "tiny"))
    (note,) = allowance(Request(model=view.path, out=tmp_path / "out", context=100), view, 0).notes
    assert "64 tokens" in note
    assert "100 asked for" in note
    assert allowance(Request(model=view.path, out=tmp_path / "out", context=64), view, 0).notes == ()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_the_default_budget_is_one_that_a_plan_can_keep(family: str, tmp_path: Path) -> None:
    view = open_checkpoint(save_tiny(tmp_path / family, family))
    allowed = allowance(Request(model=view.path, out=tmp_path / "out"), view, 0)
    assert allowed.model_budget_bytes >= allowed.smallest_bytes
    taken = allowed.account
    half = taken.total_bytes - taken.weights_bytes // 2
    assert allowed.model_budget_bytes == max(half, allowed.smallest_bytes)
    told = [note for note in allowed.notes if "no budget was given" in note]
    assert len(told) == (half < allowed.smallest_bytes)
