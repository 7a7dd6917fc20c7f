"""Classifiers that say of rows whether they are right, by one score and a line."""

from __future__ import annotations

from abc import ABC
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods.estimators._base import Classifier
from mixtura.methods.estimators._confidence import MixedNetwork
from mixtura.methods.estimators._training import seeded
from mixtura.types import Routing


class Checker(Classifier, ABC):
    """A mixture of experts whose score tells right rows from wrong ones; ``line_`` makes it log odds."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def two_classes(self, y: np.ndarray) -> np.ndarray:
        """The classes of wrong and of right rows.

        Raises:
            UserError: there are not two.
        """
        classes = self.classes_of(y)
        if len(classes) > 2:
            raise UserError(
                "Only binary classification is supported. The type of the target is multiclass; say of each "
                f"row of {type(self).__name__} whether it is right"
            )
        return classes

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability that a row is wrong, and that it is right."""
        given = self.given(self.rows(X))
        score = self.score_of(given).detach().numpy()
        share = 1 / (1 + np.exp(-np.clip(self.line_[0] * score + self.line_[1], -500, 500)))
        return np.stack([1 - share, share], axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """Whether a row is right, in the labels learned."""
        return self.most_probable(self.predict_proba(X))

    def route(self, X: Any) -> Routing:
        """Which expert is given which row, with what weight."""
        x = self.given(self.rows(X))
        with torch.no_grad():
            routing: Routing = self.module_(x).routing
        return routing

    def rebuild(self) -> None:
        with seeded(self.random_state):
            self.module_ = MixedNetwork(self.n_features_in_, 2, self).double()
        self.module_.eval()

    def given(self, X: np.ndarray) -> Float[Tensor, "T D"]:
        """Standardised rows."""
        return torch.from_numpy((X - self.mean_) / self.scale_)

    def score_of(self, x: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
        """How much more rows are like right ones than like wrong ones."""
        said: Tensor = self.module_(x).output
        return said[:, 1] - said[:, 0]
