"""Plain models that estimators are to beat: linear ones, networks of the same size, boosted trees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

# Of a network when nobody says how large.
_WIDTH = 32


def _network(kind: str, num_weights: int, d_in: int, d_out: int, seed: int) -> Any:
    """A perceptron of one hidden layer with about so many weights."""
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    width = max(2, round((num_weights - d_out) / (d_in + d_out + 1))) if num_weights else _WIDTH
    made = {"classes": MLPClassifier, "numbers": MLPRegressor}[kind]
    return _scaled(made(hidden_layer_sizes=(width,), max_iter=200, random_state=seed))


def _scaled(model: Any) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), model)


def _linear(kind: str, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression, RidgeCV

    return _scaled(
        LogisticRegression(max_iter=500, random_state=seed)
        if kind == "classes"
        else RidgeCV(np.logspace(-3, 3, 7))
    )


def _trees(kind: str, d_out: int, seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.multioutput import MultiOutputRegressor

    if kind == "classes":
        return HistGradientBoostingClassifier(max_iter=60, random_state=seed)
    plain = HistGradientBoostingRegressor(max_iter=60, random_state=seed)
    return plain if d_out == 1 else MultiOutputRegressor(plain)


LINEAR, NETWORK, TREES = "linear", "network of equal size", "boosted trees"
WHOLE, PENALTY = "one solve of the whole mesh", "penalty alone"
_SEARCHES = f"random search of {LINEAR}", f"random search of {TREES}"
NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "classes": (LINEAR, NETWORK, TREES),
    "numbers": (LINEAR, NETWORK, TREES),
    "tasks": (LINEAR, NETWORK, TREES),
    "nodes": (LINEAR, NETWORK, TREES),
    "series": ("value a season ago", LINEAR, NETWORK, TREES),
    "streams": ("naive Bayes", LINEAR),
    "plans": (LINEAR, NETWORK, TREES),
    "pairs": (LINEAR, NETWORK, TREES),
    "fields": ("state at the start", WHOLE, PENALTY, LINEAR, NETWORK),
    "fronts": ("best rows learned", *_SEARCHES),
    "draws": ("random rows", "even by k-means"),
    "markets": ("equal parts", "best asset in hindsight"),
}
SEASON: Final = 24


def plain_model(name: str, kind: str, num_weights: int, d_in: int, d_out: int, seed: int) -> Any:
    """A baseline that learns a table, of classes or of numbers."""
    makers: dict[str, Callable[[], Any]] = {
        LINEAR: lambda: _linear(kind, seed),
        NETWORK: lambda: _network(kind, num_weights, d_in, d_out, seed),
        TREES: lambda: _trees(kind, d_out, seed),
    }
    return makers[name]()


def online_model(name: str, seed: int) -> Any:
    """A baseline that learns a stream."""
    from sklearn.linear_model import SGDClassifier
    from sklearn.naive_bayes import GaussianNB

    return GaussianNB() if name == "naive Bayes" else SGDClassifier(loss="log_loss", random_state=seed)
