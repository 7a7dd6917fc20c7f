"""CoT: what a picture shows and what it is like, put together to pairs that were never learned."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods.estimators import Network, Passed
from mixtura.methods.estimators._compositions import TEMPERATURE, ComposedPairs, Composer, pairs_of, plain

METHOD = {
    "paper": 188,
    "title": "Hierarchical Visual Primitive Experts for Compositional Zero-Shot Learning",
    "tags": ["classifies", "composes"],
}


@final
class Cot(Network):
    """Say the attribute and the object of a picture, also of pairs that no row of the training had.

    Compositional zero-shot learning: a thick seven, when there were thick eights and thin sevens. The object
    expert reads the last layer; the attribute expert reads the three before it, each with channels and places
    raised that the object says. Each is compared with words of its own, both together with composed words;
    the three cosines of a pair add up. Mixtures of two pictures of one object, rare attributes drawn more,
    are trained towards the words of the mixed attribute.

    Shapes:
        ``X [n, H * W]`` with ``grid=[H, W]``, or ``[n, d]`` as one line; ``y [n, 2]`` attributes and objects;
        ``predict [n, 2]``, ``predict_proba [n, A, O]``. ``route`` weighs object, attribute and both evenly.

    Raises:
        SettingError: ``grid`` is not two numbers whose product is the width of rows, ``unseen`` is not in
            [-2, 2], ``mixing`` in [0, 1e3], or a size, rate or ``random_state`` out of range.
        UserError: a number is missing, ``y`` has not two columns, or one of them one class alone.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> y = generator.integers(0, 2, (200, 2))
        >>> X = np.where(y[:, :1] == 1, 2.0, 1.0) * np.where(y[:, 1:] == 1, [1, 1, 0, 0], [0, 0, 1, 1])
        >>> model = Cot(epochs=15).fit(X, y)
        >>> bool(model.score(X, y) > 0.9), model.predict_proba(X).shape
        (True, (200, 2, 2))

    Differences from the paper:
        Four layers of convolutions in place of a vision transformer, words learned from the start in place of
        word vectors, two linear layers without batch norm to compose them. Pairs that are mixed do not stand
        against their mixture, as they do in the released code. One share of mixing a minibatch, as there.
        Every pair may be said (the open world); ``unseen`` is added to the sum of pairs that were not
        learned: measures of the paper try all such numbers and take the best, 0.3 is our choice.

    Reference:
        Hierarchical Visual Primitive Experts for Compositional Zero-Shot Learning (paper 188);
        HanjaeKim98/CoT.
    """

    ranges: ClassVar = {"unseen": (-2, 2), "mixing": (0, 1e3)}

    def __init__(
        self,
        *,
        grid: list[int] | None = None,
        d_hidden: int = 16,
        mixing: float = 1.0,
        unseen: float = 0.3,
        epochs: int = 30,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.grid = grid
        self.d_hidden = d_hidden
        self.mixing = mixing
        self.unseen = unseen
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Cot:
        """Learn pictures, with an attribute and an object each."""
        self.check_settings()
        X = self.fresh_rows(X)
        pairs = pairs_of(self.labels(y), len(X))
        given = [plain(column) for column in pairs.T]
        self.attributes_, self.objects_ = (self.classes_of(column) for column in given)
        columns = zip((self.attributes_, self.objects_), given, strict=True)
        numbers = np.stack([np.searchsorted(known, column) for known, column in columns], axis=1)
        self.learn(X, torch.from_numpy(numbers), len(self.attributes_) * len(self.objects_))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of every attribute with every object, of the sums of cosines."""
        shares = (self.output(X) / TEMPERATURE).softmax(-1)
        said: np.ndarray = shares.unflatten(1, (len(self.attributes_), len(self.objects_))).numpy()
        return said

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest attribute and object of every row."""
        place = self.output(X).argmax(1).numpy()
        attribute, thing = np.divmod(place, len(self.objects_))
        said = self.attributes_[attribute], self.objects_[thing]
        mixed = said[0].dtype.kind != said[1].dtype.kind
        return np.stack([one.astype(object) for one in said] if mixed else said, axis=1)

    def score(self, X: Any, y: Any) -> float:
        """The share of rows of which both are right."""
        said = self.predict(X)
        return float((said == pairs_of(self.labels(y), len(said))).all(1).mean())

    def build(self, d_in: int, d_out: int) -> nn.Module:
        grid = [1, d_in] if self.grid is None else self.grid
        if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != d_in:
            raise SettingError(f"grid of Cot must be two numbers of product {d_in}, got {self.grid!r}")
        sizes = len(self.attributes_), len(self.objects_)
        return ComposedPairs(Composer((grid[0], grid[1]), *sizes, self.d_hidden), self.unseen)

    def prepare(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        assert isinstance(module, ComposedPairs)
        module.composer.seen[target[:, 0], target[:, 1]] = True
        module.composer.frequency.copy_(target[:, 0].bincount())

    def adjust(self, module: nn.Module) -> None:
        assert isinstance(module, ComposedPairs)
        module.unseen = self.unseen

    def batch_loss(self, module: nn.Module, x: Tensor, target: Tensor, progress: float) -> Tensor:
        assert isinstance(module, ComposedPairs)
        passed = module(x)
        mixed = module.composer.mixed_loss(passed.more[-1], target)
        return self.loss(passed, target, progress) + self.mixing * mixed

    def loss(self, passed: Passed, target: Int[Tensor, "T 2"], progress: float) -> Float[Tensor, ""]:
        things, manners, pairs, seen, _ = passed.more
        pair = target[:, 0] * things.shape[1] + target[:, 1]
        learned = F.cross_entropy(pairs.masked_fill(~seen, -torch.inf) / TEMPERATURE, pair)
        alone = [F.cross_entropy(c / TEMPERATURE, target[:, n]) for n, c in enumerate((manners, things))]
        return learned + 0.6 * alone[0] + 0.4 * alone[1]
