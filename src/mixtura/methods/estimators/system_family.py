"""MixER: dynamical systems of several families, each by a neural equation that its context chooses."""

from __future__ import annotations

from typing import Any, ClassVar, cast, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods.estimators import Passed, seeded
from mixtura.methods.estimators._domains import Grouped
from mixtura.methods.estimators._systems import Family, states_of

METHOD = {
    "paper": 2,
    "title": (
        "Towards Foundational Models for Dynamical System Reconstruction: Hierarchical Meta-Learning via "
        "Mixture of Experts"
    ),
    "tags": ["evolves", "reads:groups"],
}


@final
class SystemFamily(Grouped):
    """Learn how systems move in many environments, of families nobody tells apart, and adapt to new ones.

    Dynamical systems, neural ODEs, meta-learning. A row is a state, the target the state one step later,
    and ``groups`` the environment. Each environment has a context vector; a gate sends it to one expert, a
    differential equation of state and context that is solved over the step (Runge-Kutta, fourth order).
    Experts and contexts learn in turns. The gate takes no gradient: every ``refit_every`` batches contexts
    are clustered, each cluster gets the expert that does best on it, and the gate is solved for by least
    squares. `adapt` learns the context of a new environment, and nothing else.

    Shapes:
        ``X [n, d]``, ``y [n, d]``, ``groups [n]``; ``route`` sends each row to one expert.

    Raises:
        SettingError: ``d_context`` is not in [1, 4096], ``refit_every`` in [1, 1048576], or a size, rate or
            ``random_state`` out of range.
        UserError: a number is missing, targets are not of the states' width, or a group was not learned of.

    Example:
        >>> X, place = np.random.default_rng(0).normal(size=(400, 2)), np.arange(400) % 4
        >>> turn = np.where(place < 2, 0.3, -0.3)
        >>> y = np.stack([X[:, 0] - turn * X[:, 1], X[:, 1] + turn * X[:, 0]], axis=1)
        >>> model = SystemFamily(num_experts=2, epochs=30).fit(X, y, groups=place)
        >>> bool(model.score(X, y, groups=place) > 0.95)
        True

    Differences from the paper:
        Single steps in place of whole trajectories; no Taylor expansion of experts around other contexts. The
        gate is the router `mixer_gate`, with its differences. With fewer environments than experts the gate
        is never solved for. Rows of no environment known have the mean context.

    Reference:
        Towards Foundational Models for Dynamical System Reconstruction: Hierarchical Meta-Learning via
        Mixture of Experts (paper 2, abstract); ddrous/MixER.
    """

    ranges: ClassVar = {"d_context": (1, 4096), "refit_every": (1, 1 << 20)}

    def __init__(
        self,
        *,
        num_experts: int = 4,
        d_context: int = 4,
        d_hidden: int = 32,
        refit_every: int = 10,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.d_context = d_context
        self.d_hidden = d_hidden
        self.refit_every = refit_every
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, groups: Any = None) -> SystemFamily:
        """Learn from states and those one step later."""
        self.check_settings()
        X, y = self.lessons(X, y, multi_output=True, y_numeric=True)
        X, y = states_of(X, y)
        self.learn(X, torch.from_numpy(y.astype(np.float64)), X.shape[1], self.learn_groups(groups, len(X)))
        return self

    def predict(self, X: Any, groups: Any = None) -> np.ndarray:
        """The states one step later."""
        X = self.rows(X)
        made: np.ndarray = self.output_of(X, self.numbers(groups, len(X))).numpy() * self.scale_ + self.mean_
        return made

    def score(self, X: Any, y: Any, groups: Any = None) -> float:
        """The coefficient of determination of the steps, not of the states, which hardly change."""
        said = self.predict(X, groups)
        X, y = states_of(self.rows(X), self.targets(y))
        left = np.square(said - self.in_reach(y, "y")).sum()
        return float(1 - left / np.square(y - X - (y - X).mean(0)).sum())

    def adapt(self, X: Any, y: Any, name: Any) -> SystemFamily:
        """Learn the context of a new environment of this name; experts and gate stay as they are."""
        X, y = states_of(self.rows(X), self.targets(y))
        if name in self.groups_.tolist():
            raise UserError(f"there is an environment {name!r} already; give the new one another name")
        x, wanted, net = self.standardised(X), self.standardised(y), cast(Family, self.module_)
        with seeded(self.random_state):
            new = net.fitted_context(x, wanted, self)
        labels = np.array([*self.groups_.tolist(), name])
        order, self.groups_ = np.argsort(labels), np.sort(labels)
        net.contexts = nn.Parameter(torch.cat([net.contexts.detach(), new[None]])[order])
        return self

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return Family(d_in, len(self.groups_), self)

    def prepare(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        self._lessons, self._batches = (x, self._as_states(target)), 0

    def batch_loss(self, module: Any, x: Tensor, target: Tensor, progress: float) -> Float[Tensor, ""]:
        if self._batches % self.refit_every == 0:
            module.refit(*self._lessons, self.random_state + self._batches)
        self._batches += 1
        of_contexts = (self._batches // self.refit_every) % 2 == 1
        loss: Tensor = module.in_turns(x, self._as_states(target), of_contexts)
        return loss

    def loss(self, passed: Passed, target: Tensor, progress: float) -> Float[Tensor, ""]:
        return F.mse_loss(passed.output, self._as_states(target))

    def finish(self, module: Any, x: Tensor, target: Tensor) -> None:
        module.refit(*self._lessons, self.random_state)
        del self._lessons, self._batches

    def _as_states(self, target: Tensor) -> Tensor:
        """Targets in the units of the standardised states."""
        return (target - torch.from_numpy(self.mean_)) / torch.from_numpy(self.scale_)
