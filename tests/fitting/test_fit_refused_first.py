"""What a fit would stop at in the end is said before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import save_tiny
from tiny_plans import mixed_widths, write

from mixtura.errors import OutputError, UnsupportedModelError, UserError
from mixtura.fitting import Request, estimate_fit, fit
from mixtura.fitting.ongoing import work_directory

BAD = {
    "{broken": "cannot read .*generation_config.json",
    json.dumps({"early_stopping": "perhaps"}): "generation_config.json cannot be used",
    json.dumps({"eos_token_id": ["x"]}): "generation_config.json",
    json.dumps({"stop_strings": [1]}): "stop_strings in the model's generation_config.json must be",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.mark.parametrize("begin", [fit, estimate_fit])
@pytest.mark.parametrize("content", BAD)
def test_a_generation_config_that_cannot_be_used(
    content: str, begin: Callable[[Request], Any], source: Path, tmp_path: Path
) -> None:
    (source / "generation_config.json").write_text(content)
    request = Request(model=source, out=tmp_path / "out")
    with pytest.raises(UserError, match=BAD[content]):
        begin(request)
    assert not work_directory(request).exists()
    assert not request.out.exists()


@pytest.mark.parametrize("begin", [fit, estimate_fit])
def test_a_result_in_place_of_its_source(
    begin: Callable[[Request], Any], source: Path, tmp_path: Path
) -> None:
    result = write(source, tmp_path / "result", *mixed_widths(source))
    request = Request(model=result, out=tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="already in the mixtura format"):
        begin(request)
    assert not work_directory(request).exists()


def test_an_output_directory_in_the_source(source: Path) -> None:
    before = sorted(source.iterdir())
    with pytest.raises(OutputError, match="lies inside it"):
        fit(Request(model=source, out=source / "out"))
    assert sorted(source.iterdir()) == before
