"""Mowst: a weak expert that sees rows alone, and a strong one of the graph for rows it is not sure of."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.methods.estimators import Classifier, dense_routing, seeded
from mixtura.methods.estimators._graphs import WeakAndStrong, confidence, edges_of, nearest
from mixtura.types import Routing

METHOD = {
    "paper": 209,
    "title": "Mixture of Weak & Strong Experts on Graphs",
    "tags": ["classifies", "reads:edges", "tabular"],
}


@final
class Mowst(Classifier):
    """Classify nodes of a graph by a perceptron where it is sure, else by a graph network.

    Node classification, heterophily, noisy edges. The perceptron's confidence C is how far its softmax is
    from even, to a power. The loss of a row is C times the perceptron's cross-entropy and 1 - C times the
    graph network's; they learn in turns. A prediction is the same mixture of both.

    Shapes:
        ``X [n, d]``, ``y [n]``, ``edges [2, m]`` between these rows, given to ``fit`` (where ``y`` is -1 for
        rows without a label) and to ``predict``. Without edges a row's neighbours are the nearest of those
        that were learned. ``route`` gives two weights a row: C and 1 - C.

    Raises:
        SettingError: ``num_neighbours`` is not in [1, 4096], ``power`` in [0, 1e3], ``rounds`` in [1, 65536],
            or another is out of range.
        UserError: a number is missing, edges name rows that do not exist, or there is one class alone.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = Mowst(epochs=20).fit(X, y)
        >>> bool(model.score(X, y) > 0.9), model.route(X).load.tolist()
        (True, [150, 150])

    Differences from the paper:
        The graph network is two layers of means over neighbours, trained on the whole graph. A prediction is
        the mean over infinitely many draws of who answers; there it is the mean of some. The variant whose
        confidence is learned is left out; the released variance is called with arguments that do not fit it.

    Reference:
        Mixture of Weak & Strong Experts on Graphs (paper 209); facebookresearch/mowst-gnn.
    """

    ranges: ClassVar = {"num_neighbours": (1, 4096), "power": (0, 1e3), "rounds": (1, 1 << 16)}

    def __init__(
        self,
        *,
        d_hidden: int = 32,
        num_neighbours: int = 5,
        confidence: Literal["variance", "entropy"] = "variance",
        power: float = 1.0,
        rounds: int = 3,
        epochs: int = 30,
        learning_rate: float = 0.02,
        random_state: int = 0,
    ) -> None:
        self.d_hidden = d_hidden
        self.num_neighbours = num_neighbours
        self.confidence = confidence
        self.power = power
        self.rounds = rounds
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, edges: Any = None) -> Mowst:
        """Learn of the rows that have a label, and of the edges between all."""
        self.check_settings()
        X, y = self.lessons(X, y)
        known = np.ones(len(y), dtype=bool) if edges is None else y != -1
        self.classes_ = self.classes_of(y[known])
        spread = X.std(0)
        self.mean_, self.scale_ = X.mean(0), np.where(spread > 0, spread, 1.0)
        self.rows_ = (X - self.mean_) / self.scale_
        graph = nearest(self.rows_, None, self.num_neighbours) if edges is None else edges
        self.edges_ = edges_of(graph, len(X), "Mowst")
        target = torch.from_numpy(np.searchsorted(self.classes_, y[known]))
        self.rebuild()
        self._learn(torch.from_numpy(known.nonzero()[0]), target)
        return self

    def predict_proba(self, X: Any, edges: Any = None) -> np.ndarray:
        """The mixture of what both experts say of each row."""
        sure, weak, strong = self._said(X, edges)
        said: np.ndarray = (sure * weak.softmax(-1) + (1 - sure) * strong.softmax(-1)).numpy()
        return said

    def predict(self, X: Any, edges: Any = None) -> np.ndarray:
        """The most probable class of every row."""
        return self.most_probable(self.predict_proba(X, edges))

    def route(self, X: Any, edges: Any = None) -> Routing:
        sure = self._said(X, edges)[0]
        return dense_routing(torch.cat([sure, 1 - sure], dim=1))

    def rebuild(self) -> None:
        with seeded(self.random_state):
            self.module_ = WeakAndStrong(self.n_features_in_, self.d_hidden, len(self.classes_)).double()

    def _learn(self, rows: Tensor, target: Tensor) -> None:
        x, edges = torch.from_numpy(self.rows_), torch.from_numpy(self.edges_)
        experts = [self.module_.weak, self.module_.strong]
        optimizers = [torch.optim.Adam(one.parameters(), lr=self.learning_rate) for one in experts]
        for turn in range(2 * self.rounds):
            for _ in range(self.epochs):
                weak, strong = self.module_.weak(x)[rows], self.module_.strong(x, edges)[rows]
                sure = confidence(weak.detach(), self.confidence, self.power)
                each = [F.cross_entropy(one, target, reduction="none") for one in (weak, strong)]
                optimizers[turn % 2].zero_grad()
                (sure[:, 0] * each[0] + (1 - sure[:, 0]) * each[1]).mean().backward()
                optimizers[turn % 2].step()

    @torch.no_grad()
    def _said(self, X: Any, edges: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows = (self.rows(X) - self.mean_) / self.scale_
        x = torch.from_numpy(rows)
        weak = self.module_.weak(x)
        if edges is not None:
            strong = self.module_.strong(x, torch.from_numpy(edges_of(edges, len(x), "Mowst")))
        else:
            to_new = nearest(self.rows_, rows, self.num_neighbours)
            to_new[1] += len(self.rows_)
            every = torch.from_numpy(np.concatenate([self.edges_, to_new], axis=1))
            strong = self.module_.strong(torch.cat([torch.from_numpy(self.rows_), x]), every)[-len(x) :]
        return confidence(weak, self.confidence, self.power), weak, strong
