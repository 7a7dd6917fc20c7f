"""`mixtura route`: learn, measure, ask; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtura.running.composing.planted import planted
from mixtura.running.composing.reading import card_values
from mixtura.running.composing.tables import ReplayTable, split

Run = Callable[..., tuple[int, str, str]]


def write(path: Path, table: ReplayTable) -> Path:
    by_id = {prompt.id: prompt for prompt in table.prompts}
    rows = [
        {
            "id": one.prompt,
            "prompt": by_id[one.prompt].text,
            "task": by_id[one.prompt].labels["task"],
            "model": one.model,
            "score": one.score,
            "output_tokens": one.output_tokens,
            "answer": one.answer,
        }
        for one in table.outcomes
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("route")
    table = planted(320)
    train, test = split(table, 0.6, 0)
    write(folder / "train.jsonl", train)
    write(folder / "test.jsonl", test)
    (folder / "cards.json").write_text(json.dumps([card_values(card) for card in table.cards]))
    return folder


@pytest.fixture
def router(files: Path, run: Run) -> Path:
    out = files / "router"
    if not out.exists():
        code, said, err = run(
            "route", "fit", files / "train.jsonl", "--cards", files / "cards.json", "--router", "task_prior",
            "--set", "prior=2", "--out", out,
        )  # fmt: skip
        assert (code, err) == (0, "")
        assert said.startswith("task_prior learned from ")
        assert "expected scores differ from true ones by" in said
    return out


def test_it_is_measured_beside_single_models(files: Path, router: Path, run: Run) -> None:
    code, said, err = run("route", "eval", router, files / "test.jsonl", "--json")
    assert (code, err) == (0, "")
    rows = {one["name"]: one for one in json.loads(said)}
    assert rows["the router"]["score"] > rows["small"]["score"]
    assert rows["the router"]["cost"] < rows["large"]["cost"]
    code, said, _ = run("route", "eval", router, files / "test.jsonl", "--quality-per-dollar", "1e9")
    assert code == 0
    shown = {line[:18].strip(): line.split() for line in said.splitlines()}
    assert shown["the router"][2:] == shown["small"][1:]


def test_it_says_where_a_prompt_goes_and_why(router: Path, run: Run) -> None:
    code, said, _ = run("route", "ask", router, "2 + 2?", "--label", "task=algebra", "--json")
    assert code == 0
    decision = json.loads(said)
    assert decision["models"][0] == "algebraist"
    assert decision["propensities"] == {"algebraist": 1.0, "large": 0.0, "small": 0.0, "biologist": 0.0}
    code, said, _ = run("route", "ask", router, "2 + 2?", "--label", "task=chess")
    assert said.splitlines()[0] == "large"
    code, said, _ = run("route", "ask", router, "x", "--label", "task=chess", "--floor", "0.99")
    assert (code, said.splitlines()[0]) == (0, "no model is trusted with this")


def test_refusals_are_one_sentence(files: Path, router: Path, run: Run, tmp_path: Path) -> None:
    asked = ("route", "ask", router, "2 + 2?")
    for arguments, said in (
        ((*asked, "--budget", "1e-9"), "an answer may cost $0.00041, more than the budget of $1e-09"),
        ((*asked, "--need", "tools"), "no model can answer this (algebraist: lacks tools"),
        (
            (*asked, "--label", "tusk=algebra"),
            "no label in the router's table named 'tusk'; did you mean 'task'?",
        ),
        ((*asked, "--label", "task"), "a setting is written key=value, got 'task'"),
        ((*asked, "--floor", "0.9", "--fallback", "larg"), "the fallback 'larg' is none of the models"),
        ((*asked, "--fallback", "large"), "give --floor, too"),
        (("route", "ask", tmp_path, "x"), "there is no router in"),
        (
            ("route", "fit", files / "train.jsonl", "--router", "nn", "--out", tmp_path / "r"),
            "no model router",
        ),
        (("route", "fit", files / "none.jsonl", "--out", tmp_path / "r"), "there is no table"),
        (("route", "fit", files / "train.jsonl", "--out", router), "is there already"),
        (
            ("arena", "caches", "--table", files / "train.jsonl"),
            "are for model_routers and aggregators, not for caches",
        ),
        (("arena", "model_routers", "--tokens", "3"), "the arena of model_routers takes --table"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: "), arguments
        assert said in err, err
        assert err.count("\n") == 1, err
    assert not (tmp_path / "r").exists()


def test_a_table_without_prices_is_said(files: Path, run: Run, tmp_path: Path) -> None:
    code, _, err = run(
        "route", "fit", files / "train.jsonl", "--router", "best_single", "--out", tmp_path / "r"
    )
    assert code == 0
    assert err == "no prices and no costs are known: it can prefer quality alone\n"
    code, _, err = run("route", "ask", tmp_path / "r", "x", "--quality-per-dollar", "1")
    assert code == 2
    assert "give input_price and output_price on the cards" in err


def test_the_arena_writes_its_page(files: Path, run: Run, tmp_path: Path) -> None:
    code, said, err = run(
        "arena", "model_routers", "--table", files / "train.jsonl", "--cards", files / "cards.json",
        "--only", "knn", "--seeds", "1", "--out", tmp_path, "--about", "From a test.", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert {one["name"] for one in json.loads(said)} >= {"knn", "oracle", "zero_hull"}
    page = (tmp_path / "model_routers.md").read_text(encoding="utf-8")
    assert "From a test." in page
    assert (tmp_path / "model_routers.csv").is_file()


def test_policies_are_replayed_on_the_same_table(files: Path, run: Run, tmp_path: Path) -> None:
    code, said, err = run(
        "arena", "aggregators", "--table", files / "train.jsonl", "--cards", files / "cards.json",
        "--only", "vote", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0, err
    names = {one["name"] for one in json.loads(said)}
    assert names == {"vote", "single", "large", "small", "algebraist", "biologist"}
    assert (tmp_path / "aggregators.md").is_file()
    code, _, err = run("arena", "aggregators", "--only", "debate", "--out", tmp_path)
    assert code == 2
    assert "no aggregator that a table can answer named 'debate'" in err
