"""One whole fit of a tiny model, made once for all tests of a run, whichever process they are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock
from tiny_checkpoints import run_fresh, save_tiny


class Fitted(NamedTuple):
    """A source, which no test may change, and what `mixtura fit` made of it and printed."""

    source: Path
    out: Path
    told: dict[str, Any]


@pytest.fixture(scope="session")
def tiny_fit(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Fitted:
    base = tmp_path_factory.getbasetemp()
    # The workers of one run have folders side by side.
    place = (base if worker_id == "master" else base.parent) / "tiny_fit"
    source, out, said = place / "tiny", place / "out", place / "said.json"
    with FileLock(place.with_suffix(".lock")):
        if not said.exists():
            save_tiny(source)
            done = run_fresh("fit", str(source), "--out", str(out), "--json")
            assert done.returncode == 0, done.stderr
            said.write_text(done.stdout)
    return Fitted(source, out, json.loads(said.read_text()))
