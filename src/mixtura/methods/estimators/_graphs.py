"""Graphs between rows: edges that are given or nearest neighbours, and networks that average over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.metrics import accuracy_score
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.methods._scores import entropy
from mixtura.methods.estimators._base import Classifier, spread_of
from mixtura.methods.estimators._networks import perceptron
from mixtura.methods.estimators._training import seeded

Edges = Int[np.ndarray, "2 m"]


def edges_of(given: Any, num_rows: int, owner: str) -> Edges:
    """Edges as pairs of row numbers, from the first row of the array to the second.

    Raises:
        UserError: they are something else, or name rows that do not exist.
    """
    try:
        edges = np.asarray(given)
    except ValueError:
        raise UserError(
            f"edges of {owner} are whole numbers of shape [2, m], got rows of several lengths"
        ) from None
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype.kind not in "iu":
        raise UserError(
            f"edges of {owner} are whole numbers of shape [2, m], got {edges.dtype} of shape {edges.shape}"
        )
    if edges.size and (edges.min() < 0 or edges.max() >= num_rows):
        raise UserError(
            f"edges of {owner} name rows from 0 to {num_rows - 1}, got {edges.min()} to {edges.max()}"
        )
    return edges.astype(np.int64)


def nearest(known: Float[np.ndarray, "n D"], rows: Float[np.ndarray, "r D"] | None, num: int) -> Edges:
    """Edges to each row from its nearest known rows; without rows, among the known, none to itself."""
    from sklearn.neighbors import NearestNeighbors

    num = min(num, len(known) - (rows is None))
    if num < 1:
        return np.zeros((2, 0), np.int64)
    found = NearestNeighbors(n_neighbors=num).fit(known).kneighbors(rows, return_distance=False)
    ends = np.repeat(np.arange(len(found)), num)
    return np.stack([found.reshape(-1), ends]).astype(np.int64)


def neighbours_mean(x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"]) -> Float[Tensor, "n D"]:
    """The mean of the rows from which edges come; zeros for a row that none reaches."""
    sums = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
    count = torch.bincount(edges[1], minlength=len(x)).clamp(min=1)
    return sums / count[:, None]


def surroundings(x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"]) -> Float[Tensor, "n W"]:
    """What stands around each row: its neighbours' mean, how many they are, and how many those have.

    Numbers of neighbours are logarithms; of the neighbours' own, the mean and the mean of squares.
    """
    count = torch.bincount(edges[1], minlength=len(x)).to(x).log1p()[:, None]
    around = neighbours_mean(torch.cat([x, count, count.square()], dim=1), edges)
    return torch.cat([around, count], dim=1)


def likeness(rows: Float[Tensor, "E D"]) -> Float[Tensor, ""]:
    """The mean squared cosine between two rows; 0 where all are at right angles, or one is alone."""
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    others: Tensor = (unit @ unit.T).square().sum() - len(rows)
    return others / max(len(rows) * (len(rows) - 1), 1)


class NodeClassifier(Classifier, ABC):
    """A classifier of nodes: edges are given, or join each row to the nearest that were learned.

    A method says what the network is (`build`), how it learns (`learn`) and what it says of nodes
    (`shares`), and has the settings ``num_neighbours`` and ``random_state``.
    """

    module_: Any

    @abstractmethod
    def build(self, d_in: int, num_classes: int) -> nn.Module:
        """The network."""

    @abstractmethod
    def learn(
        self, x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"], rows: Int[Tensor, " r"], target: Tensor
    ) -> None:
        """Train the network on nodes, of which some rows have these classes."""

    @abstractmethod
    def shares(self, x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"]) -> Float[Tensor, "n C"]:
        """The probability of every class of every node."""

    @final
    def fit(self, X: Any, y: Any = None, edges: Any = None) -> NodeClassifier:
        """Learn of the rows that have a label, and of the edges between all.

        Raises:
            UserError: a number is missing, edges name rows that do not exist, or there is one class alone.
            SettingError: a setting is out of range.
        """
        self.check_settings()
        x, joined, rows, target = self.taught(X, y, edges)
        self.rebuild()
        with seeded(self.random_state):
            self.learn(x, joined, rows, target)
        return self

    @final
    def taught(self, X: Any, y: Any, edges: Any, **how: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A graph to learn of, which is kept: its nodes, edges, rows that have a label, and these."""
        X, y = self.lessons(X, y, **how)
        known = np.ones(len(y), dtype=bool) if edges is None else y != -1
        self.classes_ = self.classes_of(y[known])
        self.mean_, self.scale_ = X.mean(0), spread_of(X)
        self.rows_ = (X - self.mean_) / self.scale_
        graph = nearest(self.rows_, None, self.num_neighbours) if edges is None else edges
        self.edges_ = edges_of(graph, len(X), type(self).__name__)
        target = torch.from_numpy(np.searchsorted(self.classes_, y[known]))
        rows = torch.from_numpy(known.nonzero()[0])
        return torch.from_numpy(self.rows_), torch.from_numpy(self.edges_), rows, target

    @final
    def predict_proba(self, X: Any, edges: Any = None) -> np.ndarray:
        """The probability of every class, in the order of ``classes_``."""
        x, joined, num = self.placed(X, edges)
        with torch.no_grad():
            said: np.ndarray = self.shares(x, joined)[-num:].numpy()
        return said

    @final
    def predict(self, X: Any, edges: Any = None) -> np.ndarray:
        """The most probable class of every row."""
        return self.most_probable(self.predict_proba(X, edges))

    @final
    def score(self, X: Any, y: Any, sample_weight: Any = None, edges: Any = None) -> float:
        """The share of rows whose class is right; with edges those whose label is -1 do not count.

        Raises:
            UserError: labels are not one class a row, such as was learned, or edges name rows that do not
                exist.
        """
        with self.in_words():
            said, labels = self.predict(X, edges), np.asarray(y)
            weights = np.ones(len(said)) if sample_weight is None else np.asarray(sample_weight)
            if edges is not None and labels.shape == said.shape == weights.shape:
                known = labels != -1
                said, labels, weights = said[known], labels[known], weights[known]
            return float(accuracy_score(labels, said, sample_weight=weights))

    @final
    def rebuild(self) -> None:
        with seeded(self.random_state):
            self.module_ = self.build(self.n_features_in_, len(self.classes_)).double()
        self.module_.eval()

    @final
    def placed(self, X: Any, edges: Any) -> tuple[Float[Tensor, "n D"], Int[Tensor, "2 m"], int]:
        """Standardised nodes with their edges, and how many of the last are the given rows.

        Without edges the rows come after those that were learned, whose nearest point to them.
        """
        rows = (self.rows(X) - self.mean_) / self.scale_
        x = torch.from_numpy(rows)
        if edges is not None:
            return x, torch.from_numpy(edges_of(edges, len(x), type(self).__name__)), len(x)
        to_new = nearest(self.rows_, rows, self.num_neighbours)
        to_new[1] += len(self.rows_)
        every = torch.from_numpy(np.concatenate([self.edges_, to_new], axis=1))
        return torch.cat([torch.from_numpy(self.rows_), x]), every, len(x)


@final
class GraphNetwork(nn.Module):
    """Two layers, each a perceptron of a row beside the mean of its neighbours."""

    def __init__(self, d_in: int, width: int, d_out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * d_in, width), nn.Linear(2 * width, d_out)

    def forward(self, x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"]) -> Float[Tensor, "n O"]:
        """The output of every row."""
        h = self.first(torch.cat([x, neighbours_mean(x, edges)], dim=-1)).relu()
        made: Tensor = self.second(torch.cat([h, neighbours_mean(h, edges)], dim=-1))
        return made


@final
class WeakAndStrong(nn.Module):
    """A perceptron that sees a row alone, and a network of the graph."""

    def __init__(self, d_in: int, width: int, d_out: int) -> None:
        super().__init__()
        self.weak = perceptron(d_in, width, d_out)
        self.strong = GraphNetwork(d_in, width, d_out)


def confidence(logits: Float[Tensor, "T C"], kind: str, power: float) -> Float[Tensor, "T 1"]:
    """How far a softmax is from even: 0 where it is, 1 where one class has everything."""
    shares, num = logits.softmax(-1), logits.shape[1]
    if kind == "variance":
        found = (shares - 1 / num).square().sum(-1, keepdim=True) / (1 - 1 / num)
    else:
        found = 1 - entropy(shares)[:, None] / np.log(num)
    return found.clamp(0, 1) ** power
