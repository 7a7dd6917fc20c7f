"""Estimators in the hands of users: refused fits, threads, frames, scales, scores of groups and of graphs."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score, r2_score

import mixtura
from mixtura.authoring.contracts import subject
from mixtura.authoring.contracts.estimators import sample
from mixtura.errors import SettingError, UnknownNameError, UserError
from mixtura.methods import own_names
from mixtura.methods.estimators._base import number_of
from mixtura.methods.estimators._training import seeded

NAMES = own_names("estimators")
X, Y = load_iris(return_X_y=True)
QUICK = {"epochs": 2, "batch_size": 16, "steps": 20, "num_directions": 10, "closed_epochs": 2}
REGRESSORS = [
    name
    for name in NAMES
    if subject("estimators", name).has("regresses") and not subject("estimators", name).has("multi_task")
]


def made(name: str, **more: Any) -> Any:
    """An estimator that learns for a moment."""
    known = mixtura.create("estimators", name).get_params()
    given = {key: value for key, value in (QUICK | more).items() if key in known}
    return mixtura.create("estimators", name, **given)


def lessons(name: str) -> dict[str, Any]:
    return sample(subject("estimators", name), 3)


class Frame:
    """What scikit-learn takes for a table with named columns, without another library."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape = values, values.shape
        self.columns = np.array([f"column {n}" for n in range(values.shape[1])], dtype=object)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.values, dtype=dtype)

    def __len__(self) -> int:
        return len(self.values)


def names_of(table: Any) -> np.ndarray | None:
    """The columns of a `Frame`, as scikit-learn reads those of other libraries."""
    return table.columns if isinstance(table, Frame) else None


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_that_is_refused_leaves_nothing_learned(name: str) -> None:
    given, model = lessons(name), made(name)
    holed = given["X"].copy()
    holed[0, 0] = np.nan
    wrong = {"y": np.zeros_like(given["y"])} if "y" in given else {}
    for bad in ({**given, "X": holed}, {**given, **wrong, "X": -abs(given["X"])}):
        if bad["X"] is not holed and not wrong and name != "universal_portfolio":
            continue
        try:
            model.fit(**bad)
        except UserError:
            for use in ("predict", "route"):
                with pytest.raises(NotFittedError):
                    getattr(model, use)(given["X"])
            assert not [one for one in vars(model) if one.endswith("_")]
        else:
            # Numbers may be all alike.
            assert bad["X"] is not holed
            model = made(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_fit_that_is_refused_leaves_the_first(name: str) -> None:
    given = lessons(name)
    model = made(name).fit(**given)
    said, kept = model.predict(given["X"]), set(vars(model))
    with pytest.raises(UserError):
        model.fit(**{**given, "X": np.full((len(given["X"]), 3), np.nan)})
    # For what learns from rows alone these are too narrow; for others the targets are of a wrong shape.
    narrow = {"X": -given["X"][:, : 4 if name == "pi_hc_moe" else 5]}
    if "y" in given:
        narrow["y"] = np.zeros((len(given["X"]), 7, 2))
    with pytest.raises(UserError):
        model.fit(**narrow)
    assert np.array_equal(model.predict(given["X"]), said)
    assert set(vars(model)) == kept


@pytest.mark.parametrize("name", NAMES)
def test_threads_that_learn_at_once_learn_what_one_does_and_leave_the_seed(name: str) -> None:
    given = lessons(name)
    alone = made(name).fit(**given).predict(given["X"])
    before = torch.get_rng_state()
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: made(name).fit(**given).predict(given["X"]), range(4)))
    assert all(np.array_equal(one, alone) for one in found)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_can_be_taken_within_another_and_after_a_fork() -> None:
    from multiprocessing import get_context

    with seeded(3):
        first = torch.rand(2)
        with seeded(3), ThreadPoolExecutor(1):
            assert torch.equal(torch.rand(2), first)
        process = get_context("fork").Process(target=_draw)
        process.start()
        process.join(60)
    assert process.exitcode == 0


def _draw() -> None:
    with seeded(3):
        torch.rand(2)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_are_switched_off_change_nothing(name: str) -> None:
    given = lessons(name)
    model = made(name).fit(**given)
    with torch.no_grad():
        there = made(name).fit(**given)
        more = {"groups": np.zeros(len(given["X"]), int)} if name == "meta_dmoe" else {}
        off = model.predict(given["X"], **more)
    with torch.inference_mode():
        assert np.array_equal(model.predict(given["X"], **more), off)
    assert np.array_equal(model.predict(given["X"], **more), off)
    assert np.array_equal(there.predict(given["X"]), model.predict(given["X"]))


@pytest.mark.parametrize("name", NAMES)
def test_named_columns_are_never_warned_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sklearn.utils.validation._get_feature_names", names_of)
    given = lessons(name)
    frame = Frame(given["X"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*feature names")
        model = made(name).fit(**{**given, "X": frame})
        assert model.feature_names_in_.tolist() == frame.columns.tolist()
        for use in ("predict", "predict_proba", "transform", "route", "positions", "abstains", "rank"):
            if callable(getattr(model, use, None)):
                getattr(model, use)(frame)
        if hasattr(model, "score"):
            model.score(frame, given.get("y"))
        if hasattr(model, "sample"):
            model.sample(*([frame] if name == "multi_expert_ldl" else []), 3)
        if name == "outcome_forecaster":
            model.report(frame, given["y"])
        if name == "gmope":
            model.transfer(frame, given["y"])
    assert np.array_equal(
        made(name).fit(**given).predict(given["X"]), made(name).fit(**given).predict(frame.values)
    )


@pytest.mark.parametrize("name", NAMES)
def test_sparse_rows_and_numbers_that_overflow_are_refused_in_a_sentence(name: str) -> None:
    given = lessons(name)
    with pytest.raises(UserError, match="toarray"):
        made(name).fit(**{**given, "X": csr_matrix(given["X"])})
    with pytest.raises(UserError, match=r"numbers beyond 1e.150, whose squares overflow; scale them down"):
        made(name).fit(**{**given, "X": given["X"] * 1e200})
    model = made(name).fit(**given)
    with pytest.raises(UserError, match="toarray"):
        model.predict(csr_matrix(given["X"]))
    with pytest.raises(UserError, match="beyond"):
        model.predict(given["X"] * 1e200)


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_target_that_is_none_is_no_number(name: str) -> None:
    given = lessons(name)
    holed = given["y"].astype(object)
    holed[0] = None
    if holed.ndim == 1 or name != "aio_p":
        with pytest.raises(UserError, match=r"Input y contains NaN; .* takes finite numbers"):
            made(name).fit(given["X"], holed)


@pytest.mark.parametrize("name", ["crmf", "evidence_moe", "aio_p", "pareto_flow", "scale_zero"])
@pytest.mark.parametrize("scale", [2.0**-660, 2.0**-30, 2.0**30, 2.0**450])
def test_units_of_rows_and_of_targets_do_not_matter(name: str, scale: float) -> None:
    given = lessons(name)
    said = made(name).fit(**given).predict(given["X"])
    of_targets = made(name).fit(given["X"], given["y"] * scale).predict(given["X"])
    assert np.allclose(of_targets / scale, said, rtol=1e-9, atol=1e-9)
    of_rows = made(name).fit(given["X"] * scale, given["y"]).predict(given["X"] * scale)
    assert np.allclose(of_rows, said, rtol=1e-9, atol=1e-9)


def test_a_series_that_never_moves_is_forecast_to_stay() -> None:
    rows = np.full((40, 6), 0.1)
    model = mixtura.estimators.Lesa(epochs=2, closed_epochs=2).fit(rows, rows[:, :2])
    assert np.allclose(model.predict(rows), 0.1, atol=0.5)


TARGETS: dict[str, Any] = {"too few": slice(0, 5), "none": None, "one of several": 0}


@pytest.mark.parametrize("name", ["aio_p", "home", "task_prompted", "mm_drex", "system_family", "cot"])
@pytest.mark.parametrize("what", TARGETS)
def test_targets_of_another_shape_are_not_scored(name: str, what: str) -> None:
    given = lessons(name)
    model, cut = made(name).fit(**given), TARGETS[what]
    y = given["y"]
    if what == "one of several":
        bad = y[:, 0] if y.ndim == 2 else np.stack([y, y], axis=1)
    else:
        bad = None if cut is None else y[cut]
    with pytest.raises(UserError, match=r"targets of|y of Cot"):
        model.score(given["X"], bad)


def test_a_column_of_returns_is_scored_as_the_row_of_them() -> None:
    given = lessons("mm_drex")
    model = made("mm_drex").fit(**given)
    part = model.predict(given["X"])
    grown = np.log(np.maximum(1 + part * given["y"], 1e-12)).sum()
    for returns in (given["y"], given["y"][:, None]):
        assert model.score(given["X"], returns) == pytest.approx(grown)
    with pytest.raises(UserError, match="y contains NaN"):
        model.score(given["X"], given["y"] * np.nan)


def test_measures_of_nothing_have_no_agreement_and_no_warning() -> None:
    given = lessons("aio_p")
    model = made("aio_p").fit(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(model.score(given["X"], given["y"] * np.nan))


@pytest.mark.parametrize("num", [0, -1, True])
@pytest.mark.parametrize("name", ["flow_dit", "multi_expert_ldl", "pareto_flow", "mastery_sampler"])
def test_as_many_are_drawn_as_can_be_counted(name: str, num: Any) -> None:
    given = lessons(name)
    model = made(name).fit(**given)
    rows = [given["X"]] if name == "multi_expert_ldl" else []
    draw = model.draw if name == "mastery_sampler" else model.sample
    with pytest.raises(SettingError, match=r"num of (sample|draw) must be"):
        draw(*rows, num)
    unlearned = made(name)
    with pytest.raises(NotFittedError):
        (unlearned.draw if name == "mastery_sampler" else unlearned.sample)(*rows, 3)


@pytest.mark.parametrize("num", [0, -1, 1.5, "3", True])
def test_what_counts_no_draws_is_said(num: Any) -> None:
    with pytest.raises(SettingError, match="num of sample must be"):
        number_of("sample", "num", num)


def grouped() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of two groups, of which one says the opposite of the other."""
    rows = np.random.default_rng(0).normal(size=(120, 3))
    group = np.repeat([2, 10], 60)
    return rows, np.where(group == 2, rows[:, 0], -rows[:, 0]), group


def test_rows_are_scored_with_their_groups() -> None:
    rows, y, group = grouped()
    model = mixtura.estimators.ScaleZero(epochs=30).fit(rows, y, groups=group)
    assert model.score(rows, y, groups=group) == r2_score(y, model.predict(rows, groups=group)) > 0.9
    assert model.score(rows, y) == r2_score(y, model.predict(rows)) < 0.5
    tells = mixtura.estimators.MetaDmoe(epochs=5).fit(rows, y > 0, groups=group)
    weights = np.arange(120)
    wanted = accuracy_score(y > 0, tells.predict(rows, group), sample_weight=weights)
    assert tells.score(rows, y > 0, weights, groups=group) == wanted


@pytest.mark.parametrize("kind", [object, str, float, "U20", np.int8])
def test_groups_are_the_same_in_whatever_type_they_come(kind: Any) -> None:
    rows, y, group = grouped()
    model = mixtura.estimators.ScaleZero(epochs=20).fit(rows, y, groups=group)
    wanted = model.predict(rows, groups=group)
    assert np.array_equal(model.predict(rows, groups=group.astype(kind)), wanted)
    again = mixtura.estimators.ScaleZero(epochs=20).fit(rows, y, groups=group.astype(kind))
    if kind is not float:
        found = again.predict(rows, groups=group)
        assert np.corrcoef(found, y)[0, 1] > 0.9
        assert np.array_equal(again.predict(rows, groups=group.astype(kind)), found)
    with pytest.raises(UnknownNameError, match="no group named '3'"):
        model.predict(rows[:2], groups=np.array([3, 2]).astype(kind if kind is not float else int))


class NotAvailable:
    """Neither equal to anything nor not, as what is missing is in some tables."""

    def __eq__(self, other: object) -> Any:
        return self

    def __ne__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("missing", [None, np.nan, np.inf, NotAvailable()])
def test_a_missing_group_is_no_group(missing: Any) -> None:
    rows, y, group = grouped()
    labels = group.astype(object)
    labels[3] = missing
    with pytest.raises(UserError, match="groups of ScaleZero have a label that is not finite or missing"):
        mixtura.estimators.ScaleZero(epochs=1).fit(rows, y, groups=labels)
    with pytest.raises(UserError, match="several lengths"):
        mixtura.estimators.ScaleZero(epochs=1).fit(rows, y, groups=[[1], [1, 2]])


def test_nodes_are_scored_with_their_edges() -> None:
    generator = np.random.default_rng(0)
    y = np.repeat([0, 1], 30)
    rows = generator.normal(size=(60, 3))
    rows[::2, 0] += 4 * y[::2] - 2
    ends = np.stack([np.arange(60), np.arange(60) ^ 1])
    model = mixtura.estimators.Gmope(epochs=40).fit(rows, y, edges=ends)
    said = model.predict(rows, edges=ends)
    assert model.score(rows, y, edges=ends) == accuracy_score(y, said) > model.score(rows, y)
    hidden = np.where(np.arange(60) < 7, -1, y)
    assert model.score(rows, hidden, edges=ends) == accuracy_score(y[7:], said[7:])
    assert model.score(rows, y, np.arange(60), edges=ends) == accuracy_score(
        y, said, sample_weight=np.arange(60)
    )
    assert not model.module_.training
    with pytest.raises(UserError, match="inconsistent numbers of samples"):
        model.score(rows, y[:9], edges=ends)


def test_words_and_numbers_stand_side_by_side_in_pairs() -> None:
    given = lessons("cot")
    words = np.array(["thin", "thick"], dtype=object)[given["y"][:, 0]]
    pairs = np.stack([words, given["y"][:, 1].astype(object)], axis=1)
    model, plain = made("cot").fit(given["X"], pairs), made("cot").fit(given["X"], given["y"])
    said = model.predict(given["X"])
    assert {type(one) for one in said[:, 0]} == {str}
    assert {type(one) for one in said[:, 1]} == {int}
    # Words are put in their own order, "thick" first.
    assert said.shape == plain.predict(given["X"]).shape
    assert model.score(given["X"], said) == 1.0
    with pytest.raises(UserError, match="label"):
        made("cot").fit(given["X"], np.where(pairs == "thin", None, pairs))


def test_labels_of_bytes_are_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="represented as bytes is not supported"):
        mixtura.estimators.UatrCmoe(epochs=1).fit(X, Y.astype("S"))


def test_outcomes_are_reported_of_as_many_rows() -> None:
    model = mixtura.estimators.OutcomeForecaster(epochs=2).fit(X, Y)
    for bad in (Y[:5], Y[:, None], None):
        with pytest.raises(UserError, match="y of OutcomeForecaster is 150 outcomes"):
            model.report(X, bad)


def test_rows_without_labels_are_drawn_alone() -> None:
    model = mixtura.estimators.MasterySampler(num_rows=20, epochs=1)
    drawn, labels = model.fit_resample(X)
    assert labels is None
    assert np.array_equal(drawn, X[model.draw(20)])
