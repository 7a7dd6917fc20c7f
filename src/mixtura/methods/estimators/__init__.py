"""Models of scikit-learn's shape on routers and experts: tables, tasks, images, series, graphs, streams.

Methods for tables derive from `NetworkClassifier` or `NetworkRegressor`: they say what the network is and
what it is trained by. Others derive from `Estimator` itself. ``mixtura.estimators.Ride`` is the class of the
estimator ``ride``.
"""

from __future__ import annotations

from typing import Any

from mixtura.methods import class_name, load_method, names
from mixtura.methods.estimators._base import Classifier, Estimator, Regressor, spread_of
from mixtura.methods.estimators._frontiers import hypervolume, undominated
from mixtura.methods.estimators._networks import (
    Passed,
    dense_routing,
    everyone,
    one_each,
    perceptron,
    routed,
    router,
    told,
)
from mixtura.methods.estimators._physics import retardation
from mixtura.methods.estimators._series import windows
from mixtura.methods.estimators._tables import Network, NetworkClassifier, NetworkRegressor
from mixtura.methods.estimators._training import minimise, seeded
from mixtura.methods.estimators._walks import even_draw

KIND = {
    "base": "Estimator",
    "summary": "Learns from tables, series, graphs or streams as a model of scikit-learn does.",
    "tags": {
        "classifies": "`predict` says classes, `predict_proba` their probabilities",
        "regresses": "`predict` says numbers",
        "forecasts": "rows are the past of a series, oldest first, and targets what came next",
        "embeds": "`transform` gives vectors; targets are the number of the row that each belongs with",
        "evolves": "rows are states of systems, and targets the states one step later",
        "generates": "`sample` draws what may come",
        "streams": "`partial_fit` learns more without forgetting what was learned",
        "invests": "rows are how assets grew, period by period, and `predict` says how to divide money",
        "clusters": "`predict` says groups of rows that were found, and `fit_resample` draws rows of each",
        "checks": "targets say whether a row is right, and `predict` tells right rows from others",
        "composes": "targets are an attribute and an object, and `predict` says pairs never learned, too",
        "multi_task": "targets are a column a task, NaN where a task has no label",
        "tabular": "takes any table, and passes the checks that scikit-learn has for its own estimators",
        "reads:edges": "reads the edges of a graph between rows",
        "reads:groups": "is told each row's domain, task or language (`groups=`)",
    },
}
__all__ = [
    "KIND", "Classifier", "Estimator", "Network", "NetworkClassifier", "NetworkRegressor", "Passed",
    "Regressor", "dense_routing", "even_draw", "everyone", "hypervolume", "minimise", "one_each",
    "perceptron", "retardation", "routed", "router", "seeded", "spread_of", "told", "undominated", "windows",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for method in names("estimators"):
        if class_name(method) == name:
            return load_method("estimators", method)
    raise AttributeError(f"there is no estimator {name!r} in mixtura.estimators")


def __dir__() -> list[str]:
    return sorted([*__all__, *map(class_name, names("estimators"))])
