"""The arena of decoders: pairs, bounds, what is kept, and its page."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path
from typing import Any

import pytest

from mixtura.data.text import held_out_tasks
from mixtura.errors import UnknownNameError
from mixtura.methods import names
from mixtura.running.decoders.arena.entries import ABSENT, Entry, entries
from mixtura.running.decoders.arena.exam import solution_verifier
from mixtura.running.decoders.arena.run import Contest, hold, page, sign_test, standing

COST = {"num_passes": 4, "num_tokens": 20, "num_assignments": 0, "layer_passes": 24}


def result(rights: str, any_rights: str | None = None) -> dict[str, Any]:
    rows = [
        {
            "task": "addition" if place % 2 else "parity",
            "language": "en",
            "right": right == "x",
            "any_right": any_right == "x",
            "answer_tokens": 10,
        }
        for place, (right, any_right) in enumerate(zip(rights, any_rights or rights, strict=True))
    ]
    return {"rows": rows, "cost": COST, "seconds": 1.0}


@pytest.mark.parametrize(("gained", "lost"), [(6, 0), (0, 6), (5, 5), (9, 2), (1, 0)])
def test_the_sign_test_is_the_binomials_two_tails(gained: int, lost: int) -> None:
    number = gained + lost
    as_far = [k for k in range(number + 1) if abs(k - number / 2) >= abs(gained - number / 2)]
    assert sign_test(gained, lost) == pytest.approx(sum(comb(number, k) for k in as_far) / 2**number)


def test_entries_are_compared_question_by_question() -> None:
    one = standing(
        Entry(name="vote", decoder="self_consistency"),
        [result("xx..", "xxx."), result("x...")],
        [result("x..."), result(".x..")],
    )
    assert (one.gained, one.lost) == (2, 1)
    assert one.accuracy == 3 / 8
    assert one.by_seed == (0.5, 0.25)
    assert one.best_possible == 4 / 8
    assert one.tokens == 5
    assert one.by_task == {"addition": 0.25, "parity": 0.5}
    assert one.verdict == "no difference seen"


def test_the_told_verifier_counts_the_solutions_lines() -> None:
    task = next(one for one in held_out_tasks(2, 0) if one.completion.strip().count("\n") >= 1)
    verify = solution_verifier([task])
    lines = task.completion.strip().splitlines()
    scores = verify(task.prompt, [task.completion, lines[0] + "\nno", "no\n" + lines[0]])
    assert scores == [1.0, 1 / (len(lines) + 1), 0.0]


def test_one_branch_is_no_bound_and_unknown_names_are_refused() -> None:
    assert {one.decoder for one in entries()} | set(ABSENT) == set(names("decoders"))
    assert {one.name for one in entries() if one.bound} == {
        one.name for one in entries() if "(told)" in one.name
    }
    assert [one.decoder for one in entries(["scmoe"])] == ["greedy", "scmoe"]
    with pytest.raises(UnknownNameError, match="did you mean 'scmoe'"):
        entries(["scmo"])


def test_the_page_says_no_more_than_the_numbers() -> None:
    greedy = standing(entries()[0], [result("xx..")], [result("xx..")])
    worse = standing(Entry(name="bad", decoder="scmoe"), [result("." * 8)], [result("x" * 8)])
    text = page([greedy, worse], Contest(runs=Path("runs"), out=Path("out")), "tiny")
    assert "- Better than greedy: none." in text
    assert "- Worse than greedy: bad." in text
    assert "At least 6 questions gained and none lost" in text


@pytest.mark.slow
def test_what_is_measured_is_kept(tmp_path: Path) -> None:
    contest = Contest(
        only=("sampling",), num_seeds=1, num_per_task=1, runs=tmp_path / "runs", out=tmp_path / "out"
    )
    said: list[str] = []
    first = hold(contest, said.append)
    assert said == ["greedy, seed 0", "sampling, seed 0"]
    assert hold(contest, said.append) == first
    assert len(said) == 2
    assert len(json.loads((tmp_path / "out" / "decoders.json").read_text())) == 2
