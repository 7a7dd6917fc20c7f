"""Estimators of tables: classifiers and regressors whose network a method builds and whose loss it says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from mixtura.methods.estimators._base import Classifier, Estimator, Regressor, spread_of
from mixtura.methods.estimators._networks import Passed
from mixtura.methods.estimators._training import minimise, seeded
from mixtura.types import Routing

# Rows that are run at once when nothing is learned.
_AT_ONCE = 4096


class Network(Estimator, ABC):
    """An estimator that is one network, trained by a loss over minibatches of standardised rows.

    A method says what the network is (`build`) and what it is trained by (`loss`), and has the settings
    ``epochs``, ``batch_size``, ``learning_rate`` and ``random_state``.

    Attributes:
        grouped: whether the network reads a last column more, the rows' groups by number, -1 for none known.
    """

    grouped: ClassVar[bool] = False

    @abstractmethod
    def build(self, d_in: int, d_out: int) -> nn.Module:
        """The network: from rows ``[T, d_in]`` to a `Passed` with ``d_out`` outputs."""

    @abstractmethod
    def loss(
        self, passed: Passed, target: Num[Tensor, " T"] | Float[Tensor, "T O"], progress: float
    ) -> Float[Tensor, ""]:
        """What is lowered, for a minibatch; ``progress`` goes from 0 to 1 over the training."""

    def batch_loss(self, module: nn.Module, x: Tensor, target: Tensor, progress: float) -> Float[Tensor, ""]:
        """The loss of a minibatch; for methods that change rows before the network has them."""
        return self.loss(module(x), target, progress)

    def prepare(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        """Tell the network facts of the whole training set, such as how frequent classes are."""

    def finish(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        """What is learned after the network, such as when to stop."""

    def adjust(self, module: nn.Module) -> None:
        """Tell the network settings that may change after it learned."""

    @final
    def learn(self, X: np.ndarray, target: Tensor, d_out: int, groups: np.ndarray | None = None) -> None:
        """Standardise rows, build the network and train it."""
        self.mean_, self.scale_ = X.mean(0), spread_of(X)
        self.num_outputs_ = d_out
        x = self._given(X, groups)
        with seeded(self.random_state):
            self.rebuild()
            self.prepare(self.module_, x, target)
            self.module_.train()
            self.losses_ = minimise(
                self.module_.parameters(),
                lambda rows, progress: self.batch_loss(self.module_, x[rows], target[rows], progress),
                len(x),
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
            )
            self.finish(self.module_, x, target)
            self.module_.eval()

    @final
    def standardised(self, X: np.ndarray) -> Float[Tensor, "T D"]:
        """Rows of mean 0 and deviation 1, as the network reads them: in float64, as scikit-learn computes."""
        return torch.from_numpy((X - self.mean_) / self.scale_)

    def _given(self, X: np.ndarray, groups: np.ndarray | None) -> Float[Tensor, "T D"]:
        """Rows as the network reads them, with their groups where it reads these."""
        x = self.standardised(X)
        if not self.grouped:
            return x
        numbers = np.full(len(X), -1) if groups is None else groups
        return torch.cat([x, torch.from_numpy(numbers.astype(np.float64))[:, None]], dim=1)

    @final
    def rebuild(self) -> None:
        self.module_ = self.build(self.n_features_in_, self.num_outputs_).double()
        self.module_.eval()

    @final
    def run(self, X: Any, groups: np.ndarray | None = None) -> Passed:
        """What the network makes of rows, with the routing; nothing is trained."""
        return self.run_of(self.rows(X), groups)

    @final
    def run_of(self, rows: np.ndarray, groups: np.ndarray | None = None) -> Passed:
        """As `run`, of rows that are checked."""
        x = self._given(rows, groups)
        self.adjust(self.module_)
        with torch.no_grad(), seeded(self.random_state):
            passed: Passed = self.module_(x)
        return passed

    @final
    def output(self, X: Any, groups: np.ndarray | None = None) -> Float[Tensor, "T O"]:
        """The network's output of rows, some thousand at a time."""
        return self.output_of(self.rows(X), groups)

    @final
    def output_of(self, rows: np.ndarray, groups: np.ndarray | None = None) -> Float[Tensor, "T O"]:
        """As `output`, of rows that are checked."""
        x = self._given(rows, groups)
        self.adjust(self.module_)
        with torch.no_grad(), seeded(self.random_state):
            return torch.cat([self.module_(part).output for part in x.split(_AT_ONCE)])

    def route(self, X: Any) -> Routing:
        """Which expert is given which row, with what weight."""
        return self.run(X).routing


class NetworkClassifier(Classifier, Network, ABC):
    """A classifier whose network puts out a logit a class."""

    def fit(self, X: Any, y: Any = None) -> NetworkClassifier:
        """Learn classes of rows.

        Raises:
            UserError: a number is missing, there are too few rows, or there is one class alone.
            SettingError: a setting is out of range.
        """
        self.check_settings()
        X, y = self.lessons(X, y)
        self.classes_ = self.classes_of(y)
        self.learn(X, torch.from_numpy(np.searchsorted(self.classes_, y)), len(self.classes_))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of every class, in the order of ``classes_``."""
        return self.output(X).double().softmax(-1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of every row."""
        return self.most_probable(self.predict_proba(X))


class NetworkRegressor(Regressor, Network, ABC):
    """A regressor of one number or several a row, which its network puts out standardised."""

    def fit(self, X: Any, y: Any = None) -> NetworkRegressor:
        """Learn numbers of rows.

        Raises:
            UserError: a number is missing, or there are too few rows.
            SettingError: a setting is out of range.
        """
        self.check_settings()
        X, y = self.lessons(X, y, multi_output=True, y_numeric=True)
        wanted = self.scaled(y)
        self.learn(X, wanted, wanted.shape[1])
        return self

    @final
    def scaled(self, y: np.ndarray) -> Float[Tensor, "T O"]:
        """Targets of mean 0 and deviation 1, which are kept to undo it."""
        targets = y.reshape(len(y), -1).astype(np.float64)
        self.target_mean_, self.target_scale_ = targets.mean(0), spread_of(targets)
        self.is_flat_ = y.ndim == 1
        return torch.from_numpy((targets - self.target_mean_) / self.target_scale_)

    def predict(self, X: Any) -> np.ndarray:
        """The expected numbers of every row, in the shape that was learned."""
        return self.unscaled(self.output(X))

    @final
    def unscaled(self, output: Float[Tensor, "*S O"]) -> np.ndarray:
        """Outputs of the network in the units of the targets."""
        made: np.ndarray = output.numpy() * self.target_scale_ + self.target_mean_
        return made[..., 0] if self.is_flat_ else made
