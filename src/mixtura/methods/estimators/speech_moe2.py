"""SpeechMoE2: tag frames by experts that are chosen by sound, domain and accent together."""

from __future__ import annotations

from typing import ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import NetworkClassifier, Passed, minimise
from mixtura.methods.estimators._frames import losses_of
from mixtura.methods.estimators._spoken import SpokenNetwork

METHOD = {
    "paper": 74,
    "title": "SpeechMoE2: Mixture-of-Experts Model with Improved Routing",
    "tags": ["classifies", "tabular"],
}


@final
class SpeechMoe2(NetworkClassifier):
    """Classify frames of speech of several domains and accents, by experts that both of them help to choose.

    Multi-domain, multi-accent speech, frame tagging. A row is a window of spectra, and its class that of the
    middle frame. A small network first learns to name each frame's class by itself; its guess is the local
    embedding that helps routers, beside the global embeddings of the row's domain and accent, which are
    columns of the row (router ``speech_moe2``). A frame has one expert in each layer. Where a domain or an
    accent is not known, its number is -1, in learning and in predicting.

    Shapes:
        ``X [n, d]``: ``domain_column`` and ``accent_column`` hold numbers from 0, or -1, and the rest is
        ``frames`` frames of as many numbers each, the earliest first; ``y [n]``. ``route`` gives ``frames``
        tokens a row.

    Raises:
        SettingError: a column is none, or both are one; ``frames`` does not divide the rest, ``num_layers``
            is not in [1, 64], a coefficient in [0, 1e6], or another is out of range.
        UserError: a number is missing, a domain or an accent is beyond 15, or there is one class alone.

    Example:
        >>> import numpy as np
        >>> draw = np.random.default_rng(0)
        >>> accent = np.arange(300) % 2
        >>> X = draw.normal(size=(300, 6))
        >>> y = np.where(accent == 0, X[:, 2] > 0, X[:, 2] < 0)
        >>> rows = np.column_stack([X, accent])
        >>> model = SpeechMoe2(accent_column=6, frames=3, num_experts=2, epochs=20).fit(rows, y)
        >>> bool(model.score(rows, y) > 0.9)
        True

    Differences from the paper:
        Classes of frames in place of a recogniser's text. There a network trained on graphemes gives the
        local embedding and networks trained on domains and accents the global ones; here the first is the
        guess of a perceptron trained on the classes, looked up in a table, and the others are looked up by
        numbers that are given. Experts see neither. Coefficients and sizes are ours.

    Reference:
        SpeechMoE2: Mixture-of-Experts Model with Improved Routing (paper 74, abstract).
    """

    ranges: ClassVar = {
        "domain_column": (0, 1 << 20), "accent_column": (0, 1 << 20), "frames": (1, 1 << 16),
        "num_layers": (1, 64), "d_model": (1, 4096), "sparsity": (0, 1e6), "importance": (0, 1e6),
    }  # fmt: skip

    def __init__(
        self,
        *,
        domain_column: int | None = None,
        accent_column: int | None = None,
        frames: int = 1,
        num_experts: int = 4,
        num_layers: int = 2,
        d_model: int = 32,
        d_hidden: int = 32,
        sparsity: float = 0.1,
        importance: float = 0.1,
        epochs: int = 30,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.domain_column = domain_column
        self.accent_column = accent_column
        self.frames = frames
        self.num_experts = num_experts
        self.num_layers = num_layers
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.sparsity = sparsity
        self.importance = importance
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return SpokenNetwork(d_in, d_out, self)

    def prepare(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        assert isinstance(module, SpokenNetwork)
        for column in (module.domain, module.accent):
            column.learn(self.mean_, self.scale_)
            column.numbers(x)
        frames, how = module.windows(x)[:, self.frames // 2], {"epochs": self.epochs}
        minimise(
            module.local.parameters(),
            lambda rows, _: F.cross_entropy(module.local(frames[rows]), target[rows]),
            len(x),
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            **how,
        )
        module.local.requires_grad_(False)

    def loss(self, passed: Passed, target: Int[Tensor, " T"], progress: float) -> Float[Tensor, ""]:
        return F.cross_entropy(passed.output, target) + losses_of(passed.more)
