"""The disk's rate: what is read is read whole, and what cannot be read is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtura.machine.disk import disk_bytes_per_second


def test_a_rate_is_that_of_bytes_really_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(3 * 2**20 + 5))
    ticks = iter((10.0, 14.0, 20.0, 22.0) * 2)
    monkeypatch.setattr("mixtura.machine.disk.time.perf_counter", lambda: next(ticks))
    assert disk_bytes_per_second(file) == (3 * 2**20 + 5) / 2
    assert disk_bytes_per_second(file, most_bytes=1000) == 500


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        disk_bytes_per_second(tmp_path / "none")
