"""LR-MoE: tag frames of several languages, each by the experts of the language that it is heard to be."""

from __future__ import annotations

from typing import ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import NetworkClassifier, Passed, router, told
from mixtura.methods.estimators._columns import NumberColumn
from mixtura.methods.estimators._frames import FrameNetwork, channels_of, labels_of, losses_of, said
from mixtura.types import Routing

METHOD = {
    "paper": 75,
    "title": "Language-Routing Mixture of Experts for Multilingual and Code-Switching Speech Recognition",
    "tags": ["classifies", "tabular"],
}


@final
class LrMoe(NetworkClassifier):
    """Classify frames of speech in several languages, also where speakers switch from one to another.

    Multilingual speech, code-switching, frame tagging, language identification. A row is a window of
    spectra, and its class that of the middle frame. Convolutions and mixtures of experts alternate; expert e
    is that of language e. One classifier of languages, in the first layer, decides for all layers (router
    ``lr_moe``), frame by frame, and learns with the rest from rows whose language is known. What is
    predicted does not look at the column.

    Shapes:
        ``X [n, d]``: ``language_column`` holds languages from 0, or -1 where unknown, and the rest is
        ``frames`` frames of as many numbers each, the earliest first; ``y [n]``. ``route`` gives ``frames``
        tokens a row.

    Raises:
        SettingError: ``language_column`` is no column, ``frames`` does not divide the rest, ``num_layers`` is
            not in [1, 64], ``coefficient`` in [0, 1e6], or another is out of range.
        UserError: a number is missing, a language has no expert, or there is one class alone.

    Example:
        >>> import numpy as np
        >>> draw = np.random.default_rng(0)
        >>> language = np.arange(300) % 2
        >>> X = draw.normal(size=(300, 6))
        >>> y = np.where(language == 0, X[:, 2] > 0, X[:, 2] < 0)
        >>> X[:, 3] += 3 * language
        >>> rows = np.column_stack([X, language])
        >>> model = LrMoe(language_column=6, frames=3, num_experts=2, epochs=20).fit(rows, y)
        >>> bool(model.score(rows, y) > 0.9)
        True

    Differences from the paper:
        Classes of frames in place of a recogniser's text (no alignment-free loss, no encoder of attention);
        a window stands for an utterance, and only its middle frame has a label. The classifier of languages
        is the router's rows alone. Without a column nothing would teach it, so experts are then weighted by
        their probability. Two layers; sizes of ours.

    Reference:
        Language-Routing Mixture of Experts for Multilingual and Code-Switching Speech Recognition (paper
        75, abstract).
    """

    ranges: ClassVar = {
        "language_column": (0, 1 << 20), "frames": (1, 1 << 16), "num_layers": (1, 64), "d_model": (1, 4096),
        "coefficient": (0, 1e6),
    }  # fmt: skip

    def __init__(
        self,
        *,
        language_column: int | None = None,
        frames: int = 1,
        num_experts: int = 4,
        num_layers: int = 2,
        d_model: int = 32,
        d_hidden: int = 32,
        coefficient: float = 0.3,
        epochs: int = 30,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.language_column = language_column
        self.frames = frames
        self.num_experts = num_experts
        self.num_layers = num_layers
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.coefficient = coefficient
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return _Network(d_in, d_out, self)

    def prepare(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        assert isinstance(module, _Network)
        module.language.learn(self.mean_, self.scale_)
        module.language.numbers(x)

    def loss(self, passed: Passed, target: Int[Tensor, " T"], progress: float) -> Float[Tensor, ""]:
        return F.cross_entropy(passed.output, target) + losses_of(passed.more)


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, d_out: int, owner: LrMoe) -> None:
        super().__init__()
        column, num = owner.language_column, owner.num_experts
        self.language = NumberColumn("languages of LrMoe", column, d_in, -1, num - 1)
        self.frames = owner.frames
        channels = channels_of(self.language.d_out, owner.frames, "LrMoe")
        self.body = FrameNetwork(channels, d_out, owner)
        how = {"coefficient": owner.coefficient, "weighted": column is None}
        self.gate = router("lr_moe", owner.d_model, num, owner.random_state, **how)

    def forward(self, x: Float[Tensor, "n D"]) -> Passed:
        labels: dict[str, Tensor] = {}
        if self.training:
            labels = labels_of({"language": self.language.numbers(x)}, self.frames, whole=False)

        def route(rows: Tensor, layer: int, state: Tensor | None) -> Routing:
            more = {"labels": labels, "layer": layer, "state": state}
            routing: Routing = self.gate(told(rows, self.training, **more))
            return routing

        windows = self.language.features(x).reshape(len(x), self.frames, -1)
        return said(*self.body(windows, route))
