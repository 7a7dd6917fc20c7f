"""Tables of outcomes from files and back, with holes, and what is wrong with some."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mixtura.errors import UnknownNameError, UserError
from mixtura.running.composing.costs import CostModel
from mixtura.running.composing.planted import planted
from mixtura.running.composing.reading import card_values, read_cards, read_table
from mixtura.running.composing.tables import make_table, split
from mixtura.types.models import ModelCard, Outcome, Prompt

CARDS = [{"name": "a", "input_price": 0.0375, "output_price": 1}, {"name": "b", "context": 100}]


@pytest.fixture
def written(tmp_path: Path):
    def write(name: str, *rows: object) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return write


def test_rows_become_a_table(written) -> None:
    rows = [
        {"prompt": "x", "model": "b", "score": True, "cost": 0.001, "task": "t", "year": 3},
        {
            "prompt": "x",
            "model": "a",
            "score": 0.5,
            "input_tokens": 10,
            "output_tokens": 4,
            "task": "t",
            "year": 3,
        },
        {"prompt": "y", "model": "a", "score": 0, "answer": "no", "propensity": 0.25},
        {"prompt": "y", "model": "a", "score": 1},
    ]
    table = read_table(written("t.jsonl", *rows), written("cards.json", CARDS))
    assert table.names == ("a", "b")
    assert table.prompts[0].labels == {"task": "t", "year": "3"}
    assert np.array_equal(table.scores, [[0.5, 1.0], [0.5, np.nan]], equal_nan=True)
    # 10 tokens read at 37,500 pico-dollars and 4 written at a million.
    assert table.costs[0].tolist() == [4_375_000.0, 1e9]
    assert table.num_holes == 1
    assert (table.outcomes[2].answer, table.outcomes[2].propensity) == ("no", 0.25)


def test_csv_is_read_alike(written) -> None:
    path = written("t.csv", "id,prompt,model,score,task", "1,x,a,true,t", "1,x,b,0.25,t", '2,"y, z",a,0,')
    table = read_table(path)
    assert table.scores[0].tolist() == [1.0, 0.25]
    assert (table.prompts[1].id, table.prompts[1].text, dict(table.prompts[1].labels)) == ("2", "y, z", {})


def test_parquet_is_read_alike(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"prompt": ["x", "x"], "model": ["a", "b"], "score": [1.0, None]}
    parquet.write_table(arrow.table(rows), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert np.array_equal(table.scores, [[1.0, np.nan]], equal_nan=True)


def test_without_pyarrow_parquet_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").touch()
    with pytest.raises(UserError, match=r"pip install 'mixtura\[parquet\]' or give JSONL"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 1 is not JSON"),
        ([1], "line 1 is no object"),
        ({"prompt": "x"}, "row 1 lacks model; it has prompt"),
        ({"model": "a", "score": 1}, "row 1 lacks prompt; it has model, score"),
        ({"prompt": "x", "model": "a"}, "has a score; give a column 'score'"),
        ({"prompt": "x", "model": "a", "score": "good"}, "row 1: score is 'good'; give a number"),
        ({"prompt": "x", "model": "a", "score": 7}, "the score of a on x is 7.0; scores lie between 0 and 1"),
        ({"prompt": "x", "model": "a", "score": 1, "cost": -1}, "cost is -1; give a number, 0 or more"),
        ({"prompt": "x", "model": "zz", "score": 1}, "no card .* of a model named 'zz'"),
    ],
)
def test_bad_rows_are_refused(written, row: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_table(written("t.jsonl", row), written("cards.json", CARDS))


@pytest.mark.parametrize(
    ("cards", "said"),
    [
        ("[", "is not JSON"),
        ({"name": "a"}, "is no list of cards"),
        ([{"input_price": 1}], "card 1 has no name"),
        ([{"name": "a", "input_prise": 1}], "has the field 'input_prise'; did you mean 'input_price'"),
        ([{"name": "a", "input_price": "1"}], "input_price of a in .* must be a number, 0 or more, got '1'"),
        ([{"name": "a", "abilities": "tools"}], "abilities of a in .* are words in a list"),
        ([{"name": "a"}, {"name": "a"}], "cards of the same name: a"),
    ],
)
def test_bad_cards_are_refused(written, cards: object, said: str) -> None:
    table = written("t.jsonl", {"prompt": "x", "model": "a", "score": 1})
    with pytest.raises(UserError, match=said):
        read_table(table, written("cards.json", cards))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "t.txt").touch()
    (tmp_path / "t.jsonl").touch()
    with pytest.raises(UserError, match="there is no table"):
        read_table(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="is no table by its name"):
        read_table(tmp_path / "t.txt")
    with pytest.raises(UserError, match="holds no rows"):
        read_table(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_cards(tmp_path / "nowhere.json")


def test_an_id_with_two_texts_is_refused(written) -> None:
    rows = [
        {"id": 1, "prompt": "x", "model": "a", "score": 1},
        {"id": 1, "prompt": "y", "model": "a", "score": 1},
    ]
    with pytest.raises(UserError, match="row 2 has the id '1' of a row with another text"):
        read_table(written("t.jsonl", *rows))


def test_cards_survive_their_file(written) -> None:
    card = ModelCard(
        name="a",
        input_price=37_500,
        output_price=1,
        context=8,
        abilities=frozenset({"tools"}),
        address="http://x",
    )
    assert read_cards(written("c.json", [card_values(card)])) == (card,)


def test_a_split_keeps_equal_texts_together() -> None:
    prompts = [Prompt(id=str(n), text=f"text {n // 2}") for n in range(400)]
    table = make_table(prompts, [], [Outcome(prompt=p.id, model="a", score=1.0) for p in prompts])
    first, second = split(table, 0.3, seed=1)
    assert not {p.text for p in first.prompts} & {p.text for p in second.prompts}
    assert 0.2 < len(first.prompts) / 400 < 0.4
    again, _ = split(table.rows(range(0, 400, 2)), 0.3, seed=1)
    assert {p.text for p in again.prompts} == {p.text for p in first.prompts}


def test_a_part_of_the_models() -> None:
    table = planted(20)
    assert table.only(["small", "large"]).names == ("large", "small")
    with pytest.raises(UnknownNameError, match="no model in the table named 'smal'; did you mean 'small'"):
        table.only(["smal"])


def test_costs_are_expected_from_prices_and_usual_lengths() -> None:
    table = planted(200)
    model = CostModel.of(table)
    short, long = (Prompt(id=str(n), num_tokens=n) for n in (10, 1000))
    found = model.expected([short, long], table.cards)
    written = np.array([model.output_tokens[name] for name in table.names])
    prices = np.array([card.input_price for card in table.cards], dtype=float)
    assert np.allclose(found, [prices * (10 + written), prices * (1000 + written)])
    # A new model with prices is taken to write as much as the others; without them nothing is known.
    new = [ModelCard(name="new", input_price=0, output_price=2), ModelCard(name="free")]
    assert np.allclose(model.expected([short], new), [[2 * written.mean(), np.nan]], equal_nan=True)
