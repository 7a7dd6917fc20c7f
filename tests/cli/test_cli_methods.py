"""`mixtura methods`, `show`, `new` and `check`, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_methods_lists_all_by_kind(run: Run) -> None:
    code, out, _ = run("methods")
    assert code == 0
    for name in ("routers:", "top_k", "switch_loss", "belady", "round_to_nearest"):
        assert name in out


def test_methods_of_one_kind(run: Run) -> None:
    code, out, _ = run("methods", "cache")
    assert code == 0
    assert "lru" in out
    assert "top_k" not in out


def test_methods_as_json(run: Run) -> None:
    code, out, _ = run("methods", "pruners", "--json")
    assert code == 0
    objects = json.loads(out)
    by_name = {item["name"]: item for item in objects}
    assert {"frequency", "random", "reap"} <= set(by_name)
    assert by_name["reap"] == {
        "kind": "pruners",
        "name": "reap",
        "paper": 136,
        "title": "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
        "summary": "Drop the experts that add least to the layer's output when they are chosen.",
        "tags": ["statistic:weighted_output_norm", "statistic:renormalized_output_norm"],
    }


def test_methods_of_no_kind(run: Run) -> None:
    code, out, err = run("methods", "ruters")
    assert (code, out) == (2, "")
    assert err.startswith("error: no kind of method named 'ruters'; did you mean 'routers'")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--json"], ["show", "reap"], ["--help"]])
def test_listing_imports_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = "import mixtura.cli; mixtura.cli.main()"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-500:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "mixtura" in imported
    assert not imported & {"torch", "transformers", "numpy", "safetensors"}


def test_show(run: Run) -> None:
    code, out, _ = run("show", "round_to_nearest")
    assert code == 0
    for part in (
        "quantizer round_to_nearest",
        "bits: int = 4",
        "Example:",
        "Known gaps:",
        "round_to_nearest.py",
    ):
        assert part in out


def test_show_by_kind_and_as_json(run: Run) -> None:
    code, out, _ = run("show", "balancer/switch_loss", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["settings"] == [{"name": "coefficient", "type": "float", "default": "0.01"}]
    assert found["kind"] == "balancers"
    assert Path(found["path"]).is_file()


def test_show_nothing(run: Run) -> None:
    code, _, err = run("show", "switsh")
    assert code == 2
    assert err.startswith("error: no method named 'switsh'; did you mean 'switch'")


def test_new_then_check(run: Run, tmp_path: Path) -> None:
    code, out, err = run("new", "router", "my_router", "--out", str(tmp_path))
    path = tmp_path / "my_router.py"
    assert (code, out) == (0, f"wrote {path}\n")
    assert err == f"next: mixtura check router {path}\n"
    code, out, err = run("check", "router", str(path))
    assert code == 0
    assert "check_routing_is_whole" in out
    code, _, err = run("new", "router", "my_router", "--out", str(tmp_path))
    assert code == 2
    assert "is there already" in err


def test_check_says_what_fails(run: Run, tmp_path: Path) -> None:
    run("new", "cache", "mine", "--out", str(tmp_path))
    path = tmp_path / "mine.py"
    text = path.read_text()
    assert "return oldest" in text
    path.write_text(text.replace("return oldest", "return key"))
    code, out, err = run("check", "cache", str(path))
    assert code == 1
    failed = [line for line in out.splitlines() if " FAIL " in line]
    assert any(line.startswith("check_contents_follow_the_touches") for line in failed)
    assert "checks are as they should be" in err
    code, out, _ = run("check", "cache", str(path), "--json")
    assert code == 1
    assert {"check", "status", "reason"} == set(json.loads(out)[0])


def test_check_of_a_known_gap(run: Run, tmp_path: Path) -> None:
    run("new", "cache", "mine", "--out", str(tmp_path))
    path = tmp_path / "mine.py"
    text = path.read_text().replace('"Mine"', '"Mine", "gaps": {"check_doctest": "it lies"}')
    path.write_text(text.replace("True, False, False]", "True, False, True]"))
    code, out, _ = run("check", "cache", str(path))
    assert code == 0
    assert "known gap  it lies" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "no cache named 'nope'"),
        ("nope.py", "there is no file nope.py"),
    ],
)
def test_check_of_nothing(run: Run, name: str, message: str) -> None:
    code, _, err = run("check", "cache", name)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["methods", "show", "new", "check"])
def test_help_has_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"mixtura {command}" in out
