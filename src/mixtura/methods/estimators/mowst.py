"""Mowst: a weak expert that sees rows alone, and a strong one of the graph for rows it is not sure of."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import dense_routing
from mixtura.methods.estimators._graphs import NodeClassifier, WeakAndStrong, confidence
from mixtura.types import Routing

METHOD = {
    "paper": 209,
    "title": "Mixture of Weak & Strong Experts on Graphs",
    "tags": ["classifies", "reads:edges", "tabular"],
}


@final
class Mowst(NodeClassifier):
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

    def build(self, d_in: int, num_classes: int) -> nn.Module:
        return WeakAndStrong(d_in, self.d_hidden, num_classes)

    def route(self, X: Any, edges: Any = None) -> Routing:
        x, joined, num = self.placed(X, edges)
        sure = self._said(x, joined)[0][-num:]
        return dense_routing(torch.cat([sure, 1 - sure], dim=1))

    def learn(
        self, x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"], rows: Int[Tensor, " r"], target: Tensor
    ) -> None:
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

    def shares(self, x: Float[Tensor, "n D"], edges: Int[Tensor, "2 m"]) -> Float[Tensor, "n C"]:
        sure, weak, strong = self._said(x, edges)
        return sure * weak.softmax(-1) + (1 - sure) * strong.softmax(-1)

    @torch.no_grad()
    def _said(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weak, strong = self.module_.weak(x), self.module_.strong(x, edges)
        return confidence(weak, self.confidence, self.power), weak, strong
