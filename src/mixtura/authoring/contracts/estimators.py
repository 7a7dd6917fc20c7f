"""What every estimator promises."""

from __future__ import annotations

import inspect
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtura.authoring.contracts._compare import same
from mixtura.authoring.contracts._core import Subject, require, slow
from mixtura.errors import SettingError, UserError
from mixtura.methods import kind
from mixtura.methods.estimators import Estimator
from mixtura.types import Routing

_NUM_ROWS = 48
_NUM_FEATURES = 8
# Few steps: what is promised does not depend on how well was learned.
_QUICK: Mapping[str, Any] = {"epochs": 2, "batch_size": 16}


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> dict[str, np.ndarray]:
    """Rows, and targets such as the method's tags say it learns."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(_NUM_ROWS, _NUM_FEATURES))
    score = X[:, 0] + 0.5 * X[:, 1] ** 2
    if method.has("multi_task"):
        y = np.stack([score > 0, score > 1, X[:, 2] > 0], axis=1).astype(float)
        y[::5, 1] = np.nan
        return {"X": X, "y": y}
    if method.has("forecasts"):
        return {"X": X, "y": X[:, -1:] * np.array([0.9, 0.8, 0.7]) + 0.1 * score[:, None]}
    if method.has("composes"):
        return {"X": X, "y": np.stack([X[:, 2] > 0, score > 0], axis=1).astype(int)}
    if method.has("checks"):
        return {"X": X, "y": (score > 0).astype(int)}
    if method.has("classifies"):
        return {"X": X, "y": np.digitize(score, np.quantile(score, [0.33, 0.66]))}
    if method.has("invests"):
        return {"X": np.exp(0.05 * X)}
    if method.has("embeds"):
        half = _NUM_ROWS // 2
        paired = np.concatenate([X[:half], X[:half] + 0.3 * X[half:]])
        return {"X": paired, "y": np.roll(np.arange(_NUM_ROWS), half)}
    if method.has("evolves"):
        return {"X": X, "y": X + 0.1 * np.tanh(X[:, ::-1])}
    return {"X": X, "y": score}


def use(estimator: Estimator, given: dict[str, np.ndarray]) -> tuple[np.ndarray, Routing]:
    """What is predicted of the rows after learning of them, and their routing."""
    _quick(estimator).fit(**given)
    return estimator.predict(given["X"]), estimator.route(given["X"])


def check_tags_are_known(method: Subject) -> None:
    """Every tag is one that the kind explains, and the class can do what its tags say."""
    known = kind("estimators")
    for tag in method.header.tags:
        require(known.explain(tag) is not None, f"the kind has no tag {tag!r}")
    needed = {"streams": "partial_fit", "generates": "sample", "classifies": "predict_proba"}
    needed["embeds"] = "transform"
    for tag, name in needed.items():
        if method.has(tag):
            require(hasattr(method.cls, name), f"the tag {tag!r} promises {name}, which the class lacks")


def check_predictions_are_whole(method: Subject) -> None:
    """Every row has a finite prediction, and probabilities sum to one."""
    given = sample(method, 10)
    estimator = _learned(method, given)
    said = estimator.predict(given["X"])
    require(len(said) == len(given["X"]), f"{len(given['X'])} rows have {len(said)} predictions")
    if said.dtype.kind == "f":
        require(np.isfinite(said).all(), "a prediction is not finite")
    if _tells_classes(method):
        shares = estimator.predict_proba(given["X"])
        require(np.allclose(shares.sum(1), 1, atol=1e-6), "probabilities of a row do not sum to one")
        require((estimator.classes_[shares.argmax(1)] == said).all(), "`predict` is not the most probable")


def check_routing_is_whole(method: Subject) -> None:
    """`route` sends rows to experts that exist, with finite weights, as analyses and balancers read it."""
    given = sample(method, 11)
    routing = _learned(method, given).route(given["X"])
    require(isinstance(routing, Routing), "`route` must return a Routing")
    require(torch.isfinite(routing.weights).all(), "a weight is not finite")
    require(int(routing.expert_ids.max()) < routing.num_experts, "an expert does not exist")
    require(bool((routing.expert_ids.diff() >= 0).all()), "assignments are not sorted by expert")
    require(routing.num_tokens % len(given["X"]) == 0, "rows of the routing are not those of the input")


def check_rows_are_independent(method: Subject) -> None:
    """What is predicted of a row does not depend on the rows beside it, unless these are earlier periods."""
    if method.has("invests"):
        return
    given = sample(method, 12)
    estimator = _learned(method, given)
    together = estimator.predict(given["X"][:10])
    alone = np.concatenate([estimator.predict(given["X"][place : place + 1]) for place in range(10)])
    close = np.allclose(together, alone, atol=1e-5) if together.dtype.kind == "f" else same(together, alone)
    require(close, "a row is predicted otherwise when it is alone")


def check_scikit_learn_knows_it(method: Subject) -> None:
    """It can be cloned, its settings read and set, and it can be pickled."""
    from sklearn.base import clone

    given = sample(method, 13)
    estimator = _learned(method, given)
    copied = clone(estimator)
    require(copied.get_params() == estimator.get_params(), "a clone has other settings")
    require(not [n for n in vars(copied) if n.endswith("_")], "a clone remembers what was learned")
    again = pickle.loads(pickle.dumps(estimator))
    require(same(again.predict(given["X"]), estimator.predict(given["X"])), "pickling changes predictions")


def check_what_is_saved_is_loaded(method: Subject) -> None:
    """A saved estimator predicts the same to the last bit when it is loaded."""
    given = sample(method, 14)
    estimator = _learned(method, given)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept.safetensors"
        estimator.save(path)
        again = method.cls.load(path)
    require(same(again.predict(given["X"]), estimator.predict(given["X"])), "loading changes predictions")
    require(same(again.route(given["X"]), estimator.route(given["X"])), "loading changes the routing")


def check_learning_again_forgets(method: Subject) -> None:
    """`fit` on other rows leaves nothing of what was learned before."""
    first, second = sample(method, 15), sample(method, 16)
    estimator = _quick(method.create())
    estimator.fit(**first)
    estimator.fit(**second)
    fresh = _learned(method, second)
    require(same(estimator.predict(second["X"]), fresh.predict(second["X"])), "`fit` remembers other rows")


def check_seed_decides(method: Subject) -> None:
    """Another ``random_state`` draws another start, where the method draws anything."""
    given = sample(method, 17)
    if "random_state" not in method.create().get_params():
        return
    made = [_quick(method.create(random_state=seed)).fit(**given) for seed in (0, 1)]
    # Where experts are fixed, such as by time, what they say still differs.
    scores = [one.route(given["X"]).scores for one in made]
    said = [one.predict(given["X"]) for one in made]
    require(not (same(*scores) and same(*said)), "the seed changes nothing")


def check_bad_input_is_one_sentence(method: Subject) -> None:
    """Missing numbers, no rows, one class alone and rows of another width are refused in one sentence."""
    good = sample(method, 18)
    holed = {**good, "X": good["X"].copy()}
    holed["X"][3, 2] = np.nan
    cases = {"a missing number": holed, "no rows": {name: rows[:0] for name, rows in good.items()}}
    if _tells_classes(method):
        cases["one class"] = {**good, "y": np.zeros(len(good["X"]), int)}
    for what, given in cases.items():
        _require_refused(what, lambda given=given: _quick(method.create()).fit(**given))
    estimator = _learned(method, good)
    _require_refused("another width", lambda: estimator.predict(good["X"][:, :-1]))
    _require_refused("nothing learned", lambda: method.create().predict(good["X"]))


def check_settings_are_checked_when_learning(method: Subject) -> None:
    """A setting that was set out of range later is refused by `fit`, by name."""
    for name in method.create().get_params():
        estimator = method.create().set_params(**{name: {"no": "setting"}})
        try:
            estimator.fit(**sample(method, 19))
        except SettingError as error:
            require(name in str(error), f"the error for {name} does not name it: {error}")
        else:
            require(False, f"`fit` accepts {name}={{...}}")


@slow
def check_scikit_learn_accepts_it(method: Subject) -> None:
    """With the tag `tabular` it passes every check that scikit-learn has for estimators."""
    from sklearn.utils.estimator_checks import check_estimator

    if not method.has("tabular"):
        return
    # Enough steps to tell its clouds of points apart, which is what it asks of learning.
    estimator = _set(method.create(), {"epochs": 8, "batch_size": 16, "learning_rate": 0.03})
    known: Mapping[str, str] = getattr(method.cls, "scikit_learn_gaps", {})
    with warnings.catch_warnings(), _unwrapped(method.cls):
        warnings.simplefilter("ignore")
        found = check_estimator(estimator, on_fail=None, expected_failed_checks=dict(known))
    failed = [f"{one['check_name']}: {one['exception']!r}" for one in found if one["status"] == "failed"]
    require(not failed, "; ".join(failed)[:2000])
    stale = set(known) - {one["check_name"] for one in found if one["status"] == "xfail"}
    require(not stale, f"these pass now, take them out of scikit_learn_gaps: {', '.join(sorted(stale))}")


@contextmanager
def _unwrapped(cls: type[Any]) -> Iterator[None]:
    """A class whose settings nobody looks at by their annotations: wrong ones are given on purpose."""
    own = cls.__init__
    cls.__init__ = inspect.unwrap(own)
    try:
        yield
    finally:
        cls.__init__ = own


def _tells_classes(method: Subject) -> bool:
    """Whether a target is one class a row."""
    return method.has("classifies") and not method.has("multi_task") and not method.has("composes")


def _quick(estimator: Estimator) -> Estimator:
    return _set(estimator, _QUICK)


def _set(estimator: Estimator, wanted: Mapping[str, Any]) -> Estimator:
    """The estimator with those settings that it has."""
    known = estimator.get_params()
    made: Estimator = estimator.set_params(**{name: value for name, value in wanted.items() if name in known})
    return made


def _learned(method: Subject, given: dict[str, np.ndarray]) -> Any:
    return _quick(method.create()).fit(**given)


def _require_refused(what: str, act: Any) -> None:
    from sklearn.exceptions import NotFittedError

    try:
        act()
    except (UserError, NotFittedError) as error:
        text = str(error)
        require("\n" not in text and text, f"the error for {what} is not one sentence: {text!r}")
        return
    require(False, f"{what} is accepted")
