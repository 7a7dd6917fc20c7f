"""Reading tensors from their files, with and without the system's positioned reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixtura.checkpoints.viewing.headers import TensorFiles, read_header


@pytest.mark.parametrize("positioned", [True, False])
def test_tensors_and_rows_are_read_as_they_were_written(
    positioned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not positioned:
        monkeypatch.delattr(os, "preadv", raising=False)
    file = tmp_path / "model.safetensors"
    written = {"a": torch.arange(24, dtype=torch.bfloat16).view(6, 4), "b": torch.arange(5)}
    save_file(written, file)
    files = TensorFiles(read_header(file))
    for name, tensor in written.items():
        assert torch.equal(files.read(name), tensor)
    assert torch.equal(files.read("a", slice(2, 5)), written["a"][2:5])


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(length)
    file.write_bytes(length.to_bytes(8, "little") + text + bytes(8))
    assert file.read_bytes().startswith(b"\x80")
    assert torch.equal(TensorFiles(read_header(file)).read("a"), torch.zeros(2))
