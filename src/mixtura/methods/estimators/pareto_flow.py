"""ParetoFlow: designs that trade objectives off, drawn by a flow that predictors of the objectives bend."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mixtura.methods.estimators import Regressor, one_each, seeded, spread_of
from mixtura.methods.estimators._base import number_of
from mixtura.methods.estimators._frontiers import GuidedFlow, apart, directions, spread_front, worthiest
from mixtura.methods.estimators._learning import with_gradients
from mixtura.types import Routing

METHOD = {
    "paper": 216,
    "title": "ParetoFlow: Guided Flows in Multi-Objective Optimization",
    "tags": ["regresses", "generates", "tabular"],
}


@final
class ParetoFlow(Regressor):
    """Learn objectives (the smaller the better) of designs, and draw new designs on the front between them.

    Offline multi-objective optimization, Pareto frontier, flow matching, guidance by predictors. A flow
    learns where designs lie, a perceptron an objective what they are worth. `sample` lets a point a direction
    (a weighing of the objectives) flow from noise; late on, the weighed predictors bend its way, it gets
    noisy children, and the best child of the neighbouring directions that points its way lives on.

    Shapes:
        ``X [n, d]``, ``y [n, M]`` or ``[n]``; ``sample(num) [at most num, d]``, none dominated by another as
        predicted. ``route`` gives each row the direction that it is nearest to, with its worth along all.

    Raises:
        SettingError: ``num_directions`` is not in [1, 65536], ``steps`` in [2, 65536], ``guide_from`` in
            [0, 1], ``strength`` or ``jitter`` in [0, 1e3], ``children`` in [1, 4096], or another is out of
            range.
        UserError: a number is missing, or there are too few rows.

    Example:
        >>> X = np.random.default_rng(0).random((200, 2))
        >>> y = np.stack([X[:, 0], (1 - X[:, 0]) ** 2 + X[:, 1]], axis=1)
        >>> model = ParetoFlow(epochs=30, num_directions=20).fit(X, y)
        >>> drawn = model.sample(10)
        >>> bool(drawn[:, 1].mean() < 0.2), bool((drawn >= 0).all())
        (True, True)

    Differences from the paper:
        Smaller networks, fewer directions and children that are further off (there 512 wide, 400 and 0.1):
        how far selection gets in the last fifth of the steps is set by the latter. Objectives are scaled
        to [0, 1] by the rows learned of, and worth is one minus that; the released code compares worth of the
        rows (of one sign) with that of candidates (of the other) in its archive. Rows enter the archive of a
        direction only if they point its way, as candidates must; there the best enter whatever their way, and
        on a front that is not convex nothing would come after them. Bounds are those of the rows
        learned of. As there, predictors bend by the gradient of their objective at the flow's end, the flow
        itself taken as fixed, and the angle that is wide enough is the mean to the M nearest directions.

    Reference:
        ParetoFlow: Guided Flows in Multi-Objective Optimization (paper 216); StevenYuan666/ParetoFlow.
    """

    ranges: ClassVar = {
        "num_directions": (1, 1 << 16), "steps": (2, 1 << 16), "guide_from": (0, 1), "strength": (0, 1e3),
        "jitter": (0, 1e3), "children": (1, 4096),
    }  # fmt: skip

    def __init__(
        self,
        *,
        d_hidden: int = 64,
        num_directions: int = 100,
        steps: int = 1000,
        guide_from: float = 0.8,
        strength: float = 2.0,
        children: int = 5,
        jitter: float = 0.3,
        epochs: int = 100,
        batch_size: int = 64,
        learning_rate: float = 0.003,
        random_state: int = 0,
    ) -> None:
        self.d_hidden = d_hidden
        self.num_directions = num_directions
        self.steps = steps
        self.guide_from = guide_from
        self.strength = strength
        self.children = children
        self.jitter = jitter
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> ParetoFlow:
        """Learn where designs lie, and their objectives."""
        self.check_settings()
        X, y = self.lessons(X, y, multi_output=True, y_numeric=True)
        self.is_flat_, goals = y.ndim == 1, y.reshape(len(y), -1).astype(np.float64)
        self.mean_, self.scale_ = X.mean(0), spread_of(X)
        spread = np.ptp(goals, axis=0)
        self.least_, self.range_ = goals.min(0), np.where(spread > 0, spread, 1.0)
        x = torch.from_numpy((X - self.mean_) / self.scale_)
        wanted = torch.from_numpy((goals - self.least_) / self.range_)
        self.bounds_ = torch.stack([x.amin(0), x.amax(0)]).numpy()
        self.num_objectives_ = goals.shape[1]
        self.archive_ = x[worthiest(1 - wanted, self._directions())].numpy()
        self.rebuild()
        with seeded(self.random_state):
            self.module_.learn(x, wanted, self.epochs, self.batch_size, self.learning_rate)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The predicted objectives."""
        said: np.ndarray = self._objectives(self.rows(X)).numpy() * self.range_ + self.least_
        return said[:, 0] if self.is_flat_ else said

    def sample(self, num: int) -> np.ndarray:
        """At most so many designs, spread over the front that is predicted."""
        check_is_fitted(self)
        num = number_of("sample", "num", num)
        with with_gradients(), seeded(self.random_state):
            found = self.module_.flow_down(self, self._directions())
        kept = np.unique(found.numpy(), axis=0) * self.scale_ + self.mean_
        drawn: np.ndarray = kept[spread_front(self._objectives(kept).numpy(), num)]
        return drawn

    def route(self, X: Any) -> Routing:
        scores, ways = 1 - self._objectives(self.rows(X)), self._directions()
        turned = apart(scores, ways)
        return one_each(turned.argmin(1), scores @ ways.T, -turned)

    def rebuild(self) -> None:
        with seeded(self.random_state):
            self.module_ = GuidedFlow(self.n_features_in_, self.num_objectives_, self.d_hidden).double()

    def _directions(self) -> Float[Tensor, "B M"]:
        return directions(self.num_objectives_, self.num_directions)

    @torch.no_grad()
    def _objectives(self, rows: np.ndarray) -> Float[Tensor, "n M"]:
        found: Tensor = self.module_.objectives(torch.from_numpy((rows - self.mean_) / self.scale_))
        return found
