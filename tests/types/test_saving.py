"""Writing tensors, and being told why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixtura.errors import OutputError, UserError
from mixtura.fitting.publishing import beside
from mixtura.running.decoders.probing import Calibration, save_calibration
from mixtura.types.saving import save_tensors


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    save_tensors({"one": torch.arange(3.0)}, tmp_path / "file", {"a": "b"})
    assert torch.equal(load_file(tmp_path / "file")["one"], torch.arange(3.0))


def test_where_nothing_can_be_written_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent/file cannot be written \(no such file"):
        save_tensors({"one": torch.zeros(1)}, tmp_path / "absent" / "file", {})


@pytest.mark.parametrize(
    ("tensors", "values"), [({"w": torch.tensor([float("nan")])}, {}), ({}, {"left_out": float("inf")})]
)
def test_a_calibration_that_is_no_number_is_not_written(
    tensors: dict[str, torch.Tensor], values: dict[str, float], tmp_path: Path
) -> None:
    made = Calibration(method="modes", mark="", tensors=tensors, values=values)
    with pytest.raises(UserError, match="the calibration of modes became NaN or infinite"):
        save_calibration(made, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_stopped_work_lies_beside_what_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert beside(Path("out")) == Path("out.work")
    assert beside(Path(".")) == tmp_path.with_name(f"{tmp_path.name}.work")
    with pytest.raises(OutputError, match="cannot be written as a model"):
        beside(Path("/"))
