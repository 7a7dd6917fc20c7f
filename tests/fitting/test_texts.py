"""A user's task and a domain that is kept: how much of the text and of the deciding loss they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtura import specimen
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.records import TextError
from mixtura.errors import UnknownNameError, UserError
from mixtura.fitting.quality import HeldOut
from mixtura.fitting.texts import TASK_SHARE, Texts, load_texts

NAME = "task:mine"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(specimen.path())


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "mine.jsonl"
    records = [{"prompt": f"What is {n} and {n}? ", "answer": f"It is {2 * n}."} for n in range(300)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts_for(tokenizer: Any, **given: Any) -> Texts:
    return load_texts(
        None, tokenizer, length=128, calibration_tokens=2048, held_out_tokens=1024, seed=0, **given
    )


def tokens_by_domain(parts: tuple[HeldOut, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        for domain, mask in zip(part.domains, part.attention_mask, strict=True):
            name = part.domain_names[domain]
            found[name] = found.get(name, 0) + int(mask.sum())
    return found


def rows_of(parts: tuple[HeldOut, ...], name: str) -> set[tuple[int, ...]]:
    return {
        tuple(ids[mask.bool()].tolist())
        for part in parts
        for domain, ids, mask in zip(part.domains, part.input_ids, part.attention_mask, strict=True)
        if part.domain_names[domain] == name
    }


def test_a_task_has_half_of_the_text_and_of_the_loss(tokenizer: Any, task: Path) -> None:
    texts = texts_for(tokenizer, task=task)
    for parts in (texts.calibration, texts.held_out):
        tokens = tokens_by_domain(parts)
        assert tokens[NAME] / sum(tokens.values()) == pytest.approx(0.5, abs=0.05)
        assert {"code", "prose"} <= set(tokens)
    assert texts.shares == {NAME: TASK_SHARE}
    assert not rows_of(texts.calibration, NAME) & rows_of(texts.held_out, NAME)
    assert texts.notes[0].startswith(f"{NAME} is ")
    assert texts.notes[0].endswith("and 50% of the loss that decides")
    assert texts.digest != texts_for(tokenizer).digest


def test_a_short_task_is_all_there_and_the_rest_is_other_text(
    tokenizer: Any, task: Path, tmp_path: Path
) -> None:
    few = tmp_path / "mine.jsonl"
    few.write_text("\n".join(task.read_text().splitlines()[:30]))
    texts = texts_for(tokenizer, task=few)
    tokens = tokens_by_domain(texts.calibration)
    assert len(rows_of(texts.calibration, NAME)) == 20
    assert len(rows_of(texts.held_out, NAME)) == 10
    assert sum(tokens.values()) > 1024
    assert texts.shares == {NAME: TASK_SHARE}


def test_a_task_with_too_little_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "one sequence. " * 20}))
    with pytest.raises(UserError, match=r"short\.jsonl is too short: it makes 1 sequences"):
        texts_for(tokenizer, task=short)
    with pytest.raises(TextError, match="no text at"):
        texts_for(tokenizer, task=tmp_path / "none.jsonl")


def test_a_kept_domain_has_half_of_the_calibration_text(tokenizer: Any) -> None:
    texts = texts_for(tokenizer, keep_domain="code")
    tokens = tokens_by_domain(texts.calibration)
    assert tokens["code"] / sum(tokens.values()) == pytest.approx(0.5, abs=0.08)
    plain = tokens_by_domain(texts_for(tokenizer).calibration)
    assert plain["code"] / sum(plain.values()) < 0.45
    assert texts.shares == {}


def test_a_domain_that_is_not_there_is_refused_with_those_that_are(tokenizer: Any) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'code'"):
        texts_for(tokenizer, keep_domain="kode")


def test_favoured_text_comes_in_turn_with_the_rest(tokenizer: Any) -> None:
    """So whoever takes the first sequences of a part has both."""
    texts = texts_for(tokenizer, keep_domain="prose")
    part = texts.calibration[0]
    first = np.asarray(part.domains[:4]) == part.domain_names.index("prose")
    assert first.sum() == 2
