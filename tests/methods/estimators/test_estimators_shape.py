"""Estimators as scikit-learn's users meet them: by name, in pipelines and searches, saved, and refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import mixtura
from mixtura.authoring.contracts import subject
from mixtura.authoring.contracts.estimators import sample
from mixtura.errors import CheckpointError, OutputError, SettingError, UserError
from mixtura.methods import load_method, own_names

X, Y = load_iris(return_X_y=True)
WORDS = np.array(["setosa", "versicolor", "virginica"])[Y]


def test_classes_are_found_by_their_name() -> None:
    from mixtura.methods.estimators.mowst import Mowst

    assert mixtura.estimators.Mowst is Mowst
    assert "UniversalPortfolio" in dir(mixtura.estimators)
    with pytest.raises(AttributeError, match="there is no estimator 'Mowts'"):
        _ = mixtura.estimators.Mowts


def test_a_search_over_a_pipeline_finds_the_setting_that_learns() -> None:
    model = make_pipeline(StandardScaler(), mixtura.estimators.UatrCmoe(epochs=8))
    search = GridSearchCV(model, {"uatrcmoe__learning_rate": [0.0, 0.02]}, cv=2).fit(X, WORDS)
    assert search.best_params_ == {"uatrcmoe__learning_rate": 0.02}
    assert search.predict(X[:1]).tolist() == ["setosa"]
    assert search.score(X, WORDS) > 0.8


def test_a_setting_out_of_range_is_refused_by_a_search_too() -> None:
    model = mixtura.estimators.UatrCmoe(epochs=-1)
    with pytest.raises(SettingError, match="epochs of UatrCmoe must be in"):
        cross_val_score(model, X, Y, cv=2, error_score="raise")
    with pytest.raises(SettingError, match="epochs of UatrCmoe must be in"):
        mixtura.create("estimators", "uatr_cmoe", epochs=-1)
    with pytest.raises(SettingError, match="no setting 'epoch'; did you mean 'epochs'"):
        mixtura.create("estimators", "uatr_cmoe", epoch=3)


def test_classes_in_words_are_kept_with_the_rest(tmp_path: Path) -> None:
    model = mixtura.estimators.UatrCmoe(epochs=2).fit(X, WORDS)
    model.save(tmp_path / "kept.safetensors")
    before = torch.get_rng_state()
    again = mixtura.estimators.UatrCmoe.load(tmp_path / "kept.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert again.predict(X).tolist() == model.predict(X).tolist()
    assert again.get_params() == model.get_params()


def test_other_files_are_refused(tmp_path: Path) -> None:
    model = mixtura.estimators.UatrCmoe(epochs=1).fit(X, Y)
    kept, other, text = (tmp_path / name for name in ("kept", "other", "text"))
    model.save(kept)
    save_file({"a": torch.ones(1)}, other)
    text.write_text("no tensors")
    ride = mixtura.estimators.Ride
    with pytest.raises(CheckpointError, match="holds the estimator uatr_cmoe, not ride"):
        ride.load(kept)
    with pytest.raises(CheckpointError, match="holds no estimator of mixtura"):
        ride.load(other)
    for path in (text, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="cannot read"):
            ride.load(path)
    with pytest.raises(OutputError, match="cannot write"):
        model.save(tmp_path / "no folder" / "kept")


@pytest.mark.parametrize(
    ("rows", "targets", "why"),
    [
        (np.where(X > 7, np.nan, X), Y, "Input X contains NaN; UatrCmoe takes finite numbers"),
        (np.where(X > 7, np.inf, X), Y, "contains infinity"),
        (X, np.zeros(150, int), "tells classes apart and y has one class alone, 0"),
        (X[:1], Y[:1], "minimum of 2 is required"),
        (X, None, "requires y to be passed"),
        (X, Y[:20], "inconsistent numbers of samples"),
        (X, Y + 0.5, "Unknown label type"),
    ],
)
def test_what_cannot_be_learned_is_said_in_a_sentence(
    rows: np.ndarray, targets: np.ndarray | None, why: str
) -> None:
    with pytest.raises(UserError, match=why) as refused:
        mixtura.estimators.UatrCmoe(epochs=1).fit(rows, targets)
    assert "\n" not in str(refused.value)


NUMBERS = r"takes numbers, got .*; turn other values into numbers first"
LENGTHS = "have several lengths; give as many numbers in every row"
BAD_TARGETS: dict[str, tuple[Any, str]] = {
    "ragged": ([[1.0, 0.0]] * 47 + [[1.0]], LENGTHS),
    "words": (["yes", "no"] * 24, NUMBERS),
    "mixed": ([1, "yes", None] * 16, NUMBERS),
    "objects": (np.array([1, "yes", None] * 16, dtype=object), NUMBERS),
    "records": ([{"yes": 1}] * 48, NUMBERS),
    "columns": ([["yes", "no", "no"]] * 48, NUMBERS),
}

# What learns from rows alone; the targets that it is given only say how well that went.
NO_TARGETS = ("pi_hc_moe",)


@pytest.mark.parametrize("what", BAD_TARGETS)
@pytest.mark.parametrize("name", [one for one in own_names("estimators") if one != "universal_portfolio"])
def test_text_and_ragged_targets_are_refused_in_a_sentence(name: str, what: str) -> None:
    method = subject("estimators", name)
    given, (targets, why) = sample(method, 3), BAD_TARGETS[what]
    plain = mixtura.create("estimators", name).get_params()
    quick = {key: value for key, value in {"epochs": 1, "batch_size": 16}.items() if key in plain}
    classifies = method.has("classifies") and not method.has("multi_task")
    if classifies:
        why = rf"{LENGTHS}|labels of \w+ are one class a row|Unknown label type|should be a 1d array"
    if method.has("clusters"):
        why = rf"{LENGTHS}|labels of \w+ are of one type|is a label a row"
    # What targets are is said by those whose targets are no plain numbers.
    why = rf"{why}|^y of \w+ (is|holds) |should be a 1d array|requires y to be passed as"
    learned = mixtura.create("estimators", name, **quick).fit(**given)
    for use in ("score",) if name in NO_TARGETS else ("fit", "partial_fit", "score"):
        model = learned if use == "score" else mixtura.create("estimators", name, **quick)
        labels = (classifies and use != "score") or method.has("clusters")
        if not hasattr(model, use) or (labels and what in ("words", "objects") and not classifies):
            continue
        if classifies and what == "words" and use != "score":
            continue
        with pytest.raises(UserError, match=why) as refused:
            getattr(model, use)(given["X"], targets)
        assert "\n" not in str(refused.value)


def test_what_is_beside_the_targets_is_refused_in_a_sentence_too() -> None:
    with pytest.raises(UserError, match="several lengths"):
        mixtura.estimators.DriftMoe().partial_fit(X, Y, classes=[[0, 1], [2]])
    with pytest.raises(UserError, match="got rows of several lengths"):
        mixtura.estimators.Mowst().fit(X, Y, edges=[[0, 1], [2]])
    with pytest.raises(UserError, match="a series is one row of finite numbers"):
        mixtura.estimators.windows(["a", "b"], past=1, future=1)
    with pytest.raises(UserError, match="takes numbers"):
        mixtura.estimators.UniversalPortfolio().fit(np.ones((3, 2))).score([["a", "b"]])


def numpy_settings(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """All settings of an estimator as numpy's numbers, and the same as Python's."""
    plain = mixtura.create("estimators", name).get_params()
    plain |= {key: value for key, value in {"epochs": 1, "batch_size": 16}.items() if key in plain}
    theirs: dict[str, Any] = {}
    for key, value in plain.items():
        kind = {int: np.int32, float: np.float32}.get(type(value))
        theirs[key] = value if kind is None else kind(value)
    return theirs, {key: getattr(one, "item", lambda one=one: one)() for key, one in theirs.items()}


@pytest.mark.parametrize("name", own_names("estimators"))
def test_numbers_of_numpy_are_settings_like_any_others(name: str, tmp_path: Path) -> None:
    theirs, plain = numpy_settings(name)
    cls = load_method("estimators", name)
    given = sample(subject("estimators", name), 3)
    wanted = cls(**plain).fit(**given).predict(given["X"])
    for model in (cls().set_params(**theirs), mixtura.create("estimators", name, **theirs)):
        made = model.fit(**given)
        assert np.array_equal(made.predict(given["X"]), wanted)
        made.save(tmp_path / "kept.safetensors")
        again = cls.load(tmp_path / "kept.safetensors")
        assert np.array_equal(again.predict(given["X"]), wanted)
        assert again.get_params() == plain


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"learning_rate": np.float32(-1)}, "learning_rate of UatrCmoe must be in"),
        ({"epochs": np.float32(1)}, "epochs of UatrCmoe must be <class 'int'>"),
        ({"epochs": np.bool_(True)}, "epochs of UatrCmoe must be <class 'int'>"),
    ],
)
def test_settings_of_numpy_have_types_and_ranges_too(given: dict[str, Any], why: str) -> None:
    # As a search sets them.
    with pytest.raises(SettingError, match=why):
        mixtura.estimators.UatrCmoe().set_params(**given).fit(X, Y)
    with pytest.raises(SettingError, match=why.split(" <")[0]):
        mixtura.create("estimators", "uatr_cmoe", **given)


def test_without_scikit_learn_the_extra_is_named() -> None:
    code = (
        "import sys\n"
        "sys.modules['sklearn'] = None\n"
        "import mixtura\n"
        "print(mixtura.header('estimators', 'ride').paper)\n"
        "try:\n"
        "    mixtura.load_method('estimators', 'ride')\n"
        "except mixtura.UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "89",
        "estimators need scikit-learn; install mixtura[estimators]",
    ]
