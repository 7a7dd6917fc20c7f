"""Several sizes of one model: one pass over text, one result for each budget, interruptions included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoints import run_mixtura, save_tiny

import mixtura
from mixtura.fitting import Request, fit_several, several
from mixtura.running.memory import account

pytestmark = pytest.mark.slow


def sizes_of(source: Path) -> list[str]:
    taken = account(source, 64)
    return [str(taken.total_bytes - taken.weights_bytes * share // 100) for share in (40, 60)]


def test_each_budget_gets_a_result_and_the_text_is_seen_once(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny")
    sizes = sizes_of(source)
    told = run_mixtura(
        "fit", str(source), "--model-memory", ",".join(sizes), "--out", str(tmp_path / "out"), "--json"
    )
    assert told.returncode == 0, told.stderr
    assert told.stderr.count("observing and pricing every expert\n") == 1
    made = json.loads(told.stdout)
    assert [Path(one["out"]).name for one in made] == [f"out-{size}" for size in sizes]
    for size, one in zip(sizes, made, strict=True):
        assert account(one["out"], 64).total_bytes <= int(size)
        mixtura.load(one["out"])
    assert made[0]["kl"] <= made[1]["kl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["tiny", *(f"out-{s}" for s in sizes)])


def test_an_interrupted_call_keeps_the_sizes_that_it_made(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny")
    sizes = sizes_of(source)
    request = Request(model=source, out=tmp_path / "out")
    budgets = [
        Request(model=source, out=request.out, model_memory_bytes=int(size), held_out_tokens=512)
        for size in sizes
    ]
    requests = several(request, sizes, budgets)
    first = next(iter(fit_several(requests)))
    assert first is not None
    before = (requests[0].out / "measured.json").read_bytes()
    said: list[str] = []
    again = list(fit_several(requests, said.append))
    assert again[0] is None
    assert again[1] is not None
    assert (requests[0].out / "measured.json").read_bytes() == before
    assert not any(line.startswith("observing") for line in said)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--model-memory", "1GiB,1GiB"), 2, "each must be another one"),
        (("--model-memory", "1GiB,1", "--out", "x"), 3, "the smallest that still runs takes"),
        (("--memory", "1GiB,2GiB", "--estimate"), 2, "--estimate takes one budget"),
        (("--memory", "1GiB,,2GiB"), 2, "is not a size"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_begun(
    tmp_path: Path, options: tuple[str, ...], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    told = run_mixtura("fit", str(source), *options)
    assert told.returncode == code
    assert message in told.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
