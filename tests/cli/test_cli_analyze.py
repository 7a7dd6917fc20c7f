"""`mixtura analyze` and the analyses of `mixtura observe`: words, JSON, pages, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_pages import assert_self_contained
from tiny_checkpoints import run_mixtura, save_tiny

from mixtura.authoring.contracts import sample_trace
from mixtura.methods.analyses.efficiency_leverage import EfficiencyLeverage

SAID = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("traces")
    found = []
    for number in range(2):
        path = folder / f"step{number}.trace"
        sample_trace(seed=number).save(path)
        found.append(str(path))
    return found


def test_checkpoints_are_compared(traces: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    asked = ["--analysis", "router_dynamics,token_routing", "--steps", "100,900", "--report", str(page)]
    result = run_mixtura("analyze", *traces, *asked)
    assert result.returncode == 0, result.stderr
    assert "router_dynamics: saturation" in result.stdout
    assert "By checkpoint" in result.stdout
    html = page.read_text()
    assert_self_contained(html)
    assert "Router dynamics" in html
    assert "<svg" in html


def test_a_table_is_read(tmp_path: Path) -> None:
    rows = tmp_path / "runs.csv"
    names = list(EfficiencyLeverage.example[0])
    lines = [",".join(names), *(",".join(str(row[n]) for n in names) for row in EfficiencyLeverage.example)]
    rows.write_text("\n".join(lines))
    result = run_mixtura("analyze", "--analysis", "efficiency_leverage", "--runs", str(rows), "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["analyses"]["efficiency_leverage"]
    assert found["scalars"]["r_squared"] == pytest.approx(1)
    assert len(found["tables"][0]["rows"]) == 27


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TRACE", "--analysis", "router_dynamic"], "did you mean 'router_dynamics'"),
        (["TRACE", "--analysis", "router_dynamics"], "compares 2 checkpoints or more, and there is 1"),
        (["--analysis", "load"], "there is no trace to analyse"),
        (["TRACE", "--analysis", " "], "name an analysis"),
        (["TRACE", "--analysis", "batch_leak"], "use 'mixtura observe MODEL --analysis batch_leak'"),
        (["TRACE", "--analysis", "load", "--set", "dead=1"], "did you mean 'dead_share'"),
        (["TRACE", "--analysis", "load,congestion", "--set", "dead_share=0"], "--set is for one analysis"),
        (["TRACE", "TRACE", "--analysis", "router_dynamics", "--steps", "a"], "numbers with commas"),
        (["TRACE", "TRACE", "--analysis", "router_dynamics", "--steps", "9,3"], "in rising order"),
        (["nowhere.trace", "--analysis", "load"], "nowhere.trace is not a trace"),
        (["--analysis", "speedup_choice"], "give it by --runs"),
        (["--analysis", "speedup_choice", "--runs", "nowhere.json"], "nowhere.json cannot be read"),
        (["--analysis", "speedup_choice", "--runs", "EMPTY"], "holds no table"),
    ],
)
def test_bad_input_is_one_sentence(
    traces: list[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    given = [{"TRACE": traces[0], "EMPTY": str(empty)}.get(one, one) for one in arguments]
    result = run_mixtura("analyze", *given)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.slow
def test_a_model_is_run_again_and_shown(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    text = tmp_path / "text"
    text.mkdir()
    (text / "animals.txt").write_text(SAID * 8)
    (text / "sums.txt").write_text("1 + 2 = 3, " * 30)
    page = tmp_path / "page.html"
    shared = ["observe", str(model), "--text", str(text), "--tokens", "256", "--length", "32"]
    names = "route_explainer,expert_similarity,class_attribution"
    result = run_mixtura(*shared, "--analysis", names, "--report", str(page), "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["analyses"]
    assert found["route_explainer"]["sentences"][0].startswith("After ")
    assert "Influence of each choice" in page.read_text()
    result = run_mixtura(*shared, "--analysis", "route_explainer", "--set", "text=1", "--set", "token=99")
    assert result.returncode == 2
    assert "has no successor to compare" in result.stderr
    result = run_mixtura(*shared, "--analysis", "router_dynamics")
    assert result.returncode == 2
    assert "observe each with --save" in result.stderr
