"""The arena of pruners: who takes part, what is measured of a plan, the tables, and a contest end to end."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import run_mixtura, save_tiny
from torch.nn import functional as F

from mixtura.authoring.contracts import sample_trace
from mixtura.checkpoints.view import masked
from mixtura.errors import SettingError, UnknownNameError
from mixtura.fitting.arena.entries import REFERENCE, Entry, entries
from mixtura.fitting.arena.exam import Exam, Sizes
from mixtura.fitting.arena.run import Contest, hold
from mixtura.fitting.arena.standings import KEEPS, MIDDLE, Standing, standings
from mixtura.fitting.texts import load_texts
from mixtura.methods import create, names
from mixtura.types import Budget, Drop, Plan

SMALL = Sizes(length=48, held_out_tokens=400, tasks=1, prompts=3, prompt_tokens=8, new_tokens=6)
PLAN = Plan("", tuple(Drop(layer, (1, 4, 6)) for layer in range(3)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("arena") / "tiny")


@pytest.fixture(scope="module")
def exam(tiny: Path) -> Exam:
    return Exam(tiny, SMALL, seed=1)


def test_every_pruner_takes_part_and_baselines_always() -> None:
    assert set(names("pruners")) <= {entry.name for entry in entries()}
    chosen = entries(["reap"])
    assert [entry.name for entry in chosen if not entry.baseline] == ["reap"]
    assert REFERENCE in {entry.name for entry in chosen if entry.baseline}
    with pytest.raises(UnknownNameError, match="did you mean 'reap'"):
        entries(["reep"])


def test_an_entry_plans_as_its_pruner_does_with_its_settings() -> None:
    trace = sample_trace(num_experts=16)
    for entry in entries():
        if not entry.protects and entry.reads_text:
            pruner = create("pruners", entry.method, **entry.settings)
            assert entry.plan(trace, 8, seed=5) == pruner.plan(trace, Budget(num_experts=8))
    drawn = Entry(name="random", method="random")
    assert drawn.plan(trace, 8, seed=1) == create("pruners", "random", seed=1).plan(
        trace, Budget(num_experts=8)
    )
    assert drawn.plan(trace, 8, seed=1) != drawn.plan(trace, 8, seed=2)


def test_protected_super_experts_stay() -> None:
    trace = sample_trace(num_experts=16)
    trace.layers[0].statistics["max_output"][0, 3] = 1e4
    trace.layers[0].statistics["weighted_output_norm"][:, 3] = 0.0
    plain, protected = Entry(name="a", method="reap"), Entry(name="b", method="reap", protects=True)
    assert 3 in plain.plan(trace, 8, 0).dropped()[0]
    assert 3 not in protected.plan(trace, 8, 0).dropped()[0]
    assert set(protected.statistics) == {*plain.statistics, "max_output"}


@torch.no_grad()
def by_hand(exam: Exam, plan: Plan) -> dict[str, float]:
    """KL, equal top tokens and perplexity, position by position, the experts masked and not dropped."""
    model: Any = exam.model
    parts = load_texts(
        None, exam._tokenizer, length=48, calibration_tokens=1, held_out_tokens=400, seed=1
    ).held_out
    kl, nll, equal = [], [], []
    for part in parts:
        for ids, mask in zip(part.input_ids, part.attention_mask, strict=True):
            tokens = ids[mask.bool()][None]
            before = model(input_ids=tokens, use_cache=False).logits[0]
            with masked(model, plan.dropped()):
                after = model(input_ids=tokens, use_cache=False).logits[0]
            for place in range(tokens.shape[1] - 1):
                wanted, given = before[place].log_softmax(-1), after[place].log_softmax(-1)
                kl.append(float(F.kl_div(given, wanted, log_target=True, reduction="sum")))
                nll.append(-float(given[tokens[0, place + 1]]))
                equal.append(int(wanted.argmax()) == int(given.argmax()))
    return {
        "kl": sum(kl) / len(kl),
        "perplexity": math.exp(sum(nll) / len(nll)),
        "equal_top": sum(equal) / len(equal),
    }


def test_the_loss_is_what_a_plain_loop_measures(exam: Exam) -> None:
    found, expected = exam.loss(PLAN), by_hand(exam, PLAN)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert found["equal_top"] == pytest.approx(expected["equal_top"], abs=0.01)
    assert found["perplexity"]["all"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert set(found["kl_by_domain"]) == {"code", "prose", "tasks"}
    assert found["kl"] > 1e-4


def test_no_plan_changes_nothing_and_the_model_stays_whole(exam: Exam) -> None:
    before = copy.deepcopy(exam.model.state_dict())
    found = exam.loss(Plan("")) | exam.words(Plan(""))
    assert (found["kl"], found["equal_top"], found["agreement"]) == (pytest.approx(0, abs=1e-6), 1.0, 1.0)
    assert exam.words(PLAN)["agreement"] < 1.0
    assert all(torch.equal(value, before[name]) for name, value in exam.model.state_dict().items())


def test_text_and_sizes_make_another_exam(tiny: Path, exam: Exam) -> None:
    assert Exam(tiny, SMALL, seed=1).digest == exam.digest
    assert Exam(tiny, SMALL, seed=2).digest != exam.digest


def row(
    name: str, seed: int, kl: float, keep: float = MIDDLE, calibration: str = "all", **domains: float
) -> Any:
    return {
        "name": name,
        "keep": keep,
        "seed": seed,
        "calibration": calibration,
        "kl": kl,
        "equal_top": 0.5,
        "perplexity": {"code": 10.0 + seed, "all": 20.0},
        "kl_by_domain": domains,
    }


def test_tables_by_hand() -> None:
    rows = [row(REFERENCE, seed, kl, a=kl, b=kl) for seed, kl in enumerate((1.0, 2.0, 4.0))]
    rows += [row("reap", seed, kl, a=kl, b=kl) for seed, kl in enumerate((0.5, 1.0, 2.02))]
    rows += [row("easy_ep", seed, kl, a=kl, b=kl) for seed, kl in enumerate((1.0, 2.0, 4.04))]
    rows += [row("random", seed, kl, a=kl, b=kl) for seed, kl in enumerate((9.0, 2.0, 3.0))]
    rows += [row("reap", 0, 9.0, calibration="a", a=0.25, b=2.0)]
    rows += [row("reap", 0, 9.0, calibration="b", a=3.0, b=0.75)]
    rows += [row("reap", 0, 9.0, keep=0.75)]
    table = {one.name: one for one in standings(rows, MIDDLE)}
    reap = table["reap"]
    assert reap.values["kl"] == pytest.approx((0.5 + 1.0 + 2.02) / 3)
    assert reap.ratio == pytest.approx((0.5 * 0.5 * 0.505) ** (1 / 3))
    assert reap.perplexity == {"code": 11.0, "all": 20.0}
    assert reap.by_domain == {"own": 0.5, "all": pytest.approx(reap.values["kl"]), "another": 2.5}
    # The others differ from the reference by far less, or by far more noise.
    said = {name: one.verdict for name, one in table.items()}
    assert said == {
        REFERENCE: "reference", "reap": "better", "easy_ep": "not separated", "random": "not separated",
    }  # fmt: skip
    assert next(one.name for one in standings(rows, MIDDLE)) == "reap"
    assert table["easy_ep"].by_domain == {}


def test_too_little_text_is_refused() -> None:
    with pytest.raises(SettingError, match="at least 64"):
        Contest(num_tokens=5)


@pytest.mark.slow
def test_a_contest_is_kept_and_goes_on(tiny: Path, tmp_path: Path) -> None:
    def run() -> tuple[list[Standing], list[str]]:
        said: list[str] = []
        contest = Contest(
            only=("reap", "reap_protected"), num_seeds=2, num_tokens=300, model=tiny, sizes=SMALL,
            runs=tmp_path / "runs", out=tmp_path / "out",
        )  # fmt: skip
        return hold(contest, said.append), said

    table, said = run()
    assert {one.keep for one in table} == set(KEEPS)
    assert sum("observing" in line for line in said) == 2
    page = (tmp_path / "out/pruners.md").read_text()
    assert "Calibrated on the wrong domain" in page
    assert "`reap` with super experts protected" in page
    numbers = json.loads((tmp_path / "out/pruners.json").read_text())
    # Two seeds of four entries at three shares, and of the three that read text on three domains.
    assert len(numbers["cases"]) == 2 * (4 * 3 + 3 * 3)
    assert numbers["original"]["kl"] == pytest.approx(0, abs=1e-6)
    kept = sorted((tmp_path / "runs/pruners").glob("*-words.json"))
    kept[0].unlink()
    kept[1].write_text("{")
    again, said = run()
    assert not any("observing" in line for line in said)
    assert 1 <= len(said) <= 2 * len(KEEPS) * 4
    for one, other in zip(table, again, strict=True):
        assert one == other


@pytest.mark.slow
def test_shares_that_routing_cannot_do_with_are_left_out(tmp_path: Path) -> None:
    # Two groups, of which a token needs two experts each.
    save_tiny(tmp_path / "grouped", "deepseek_v3")
    said: list[str] = []
    contest = Contest(
        only=("reap",), num_seeds=1, num_tokens=300, model=tmp_path / "grouped", sizes=SMALL,
        runs=tmp_path / "runs", out=tmp_path / "out",
    )  # fmt: skip
    table = hold(contest, said.append)
    assert {one.keep for one in table} == {0.75, 0.5}
    assert sum("25% of the experts are left out" in line for line in said) == 1
    assert "25% of the experts" not in (tmp_path / "out/pruners.md").read_text()


@pytest.mark.slow
def test_the_command(tiny: Path, tmp_path: Path) -> None:
    places = ("--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--model", str(tiny))
    done = run_mixtura("arena", "pruners", "--only", "reap", "--seeds", "1", "--tokens", "300", *places)
    assert done.returncode == 0, done.stderr
    assert "not separated" in done.stdout
    assert (tmp_path / "out/pruners.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prunners",), "did you mean 'pruners'"),
        (("pruners", "--only", "reep"), "did you mean 'reap'"),
        (("pruners", "--model", "no/such/place"), "takes the directory of a checkpoint"),
        (("pruners", "--tokens", "9"), "at least 64"),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = ("--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"))
    done = run_mixtura("arena", *arguments, *places)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
