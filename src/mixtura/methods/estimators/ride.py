"""RIDE: experts that are pushed apart, aware of how rare a class is, and run one by one as needed."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import NetworkClassifier, Passed, minimise, perceptron
from mixtura.methods.estimators._long_tail import (
    Cascade,
    counts_of,
    diversity,
    effective_weights,
    margins,
    temperatures,
    with_margin,
)

METHOD = {
    "paper": 89,
    "title": "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts",
    "tags": ["classifies", "tabular"],
}


@final
class Ride(NetworkClassifier):
    """Classify by the mean of experts that were trained to differ; most rows need only the first.

    For imbalanced, long-tailed classes. Experts read common features; each has the loss LDAM, whose margin is
    wider for rarer classes, less ``diversity`` times its divergence from the experts' mean. In the last part
    of the training rare classes weigh more. Then, the rest frozen, a gate after each expert learns whether
    the mean so far is wrong and a later one right: only where it says so, above ``threshold``, the next
    expert runs.

    Shapes:
        ``X [n, d]``, ``y [n]``; ``route`` gives a row's experts, of one to ``num_experts``, equal weights.

    Raises:
        SettingError: ``diversity`` is not in [0, 1e3], ``reweight_from`` or ``threshold`` in [0, 1], or a
            size, rate or ``random_state`` out of range.
        UserError: a number is missing, or there is one class alone.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = Ride(epochs=20).fit(X[:120], y[:120])
        >>> all_of_them = model.set_params(threshold=0.0).route(X).load.tolist()
        >>> all_of_them, model.set_params(threshold=1.0).route(X).load.tolist()
        ([150, 150, 150], [150, 0, 0])

    Differences from the paper:
        Features and experts are perceptrons in place of the blocks of a ResNet. ``diversity`` is minus the
        released factor. Reweighting starts after four fifths of the epochs. There all experts may be
        distilled from a larger ensemble first; here not. With ``diversity=0`` the released code trains every
        expert on the ensemble's logits; here it only leaves the term out. Adam in place of SGD.

    Reference:
        Long-tailed Recognition by Routing Diverse Distribution-Aware Experts (paper 89);
        ``RIDELoss`` in frank-xwang/RIDE-LongTailRecognition.
    """

    ranges: ClassVar = {"diversity": (0, 1e3), "reweight_from": (0, 1), "threshold": (0, 1)}

    def __init__(
        self,
        *,
        num_experts: int = 3,
        d_hidden: int = 32,
        diversity: float = 0.2,
        reweight_from: float = 0.8,
        threshold: float = 0.5,
        epochs: int = 60,
        batch_size: int = 32,
        learning_rate: float = 0.01,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.d_hidden = d_hidden
        self.diversity = diversity
        self.reweight_from = reweight_from
        self.threshold = threshold
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def build(self, d_in: int, d_out: int) -> nn.Module:
        features = nn.Sequential(perceptron(d_in, self.d_hidden), nn.ReLU())
        return Cascade(features, self.d_hidden, d_out, self.num_experts)

    def prepare(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        assert isinstance(module, Cascade)
        module.counts.copy_(counts_of(target, len(module.counts)))

    def adjust(self, module: nn.Module) -> None:
        assert isinstance(module, Cascade)
        module.threshold = self.threshold

    def loss(self, passed: Passed, target: Int[Tensor, " T"], progress: float) -> Float[Tensor, ""]:
        late = progress > self.reweight_from
        counts, total = passed.more, passed.output.new_zeros(())
        weights = effective_weights(counts) if late else None
        warm = temperatures(counts) if late else torch.ones_like(counts)
        assert passed.outputs is not None
        for logits in passed.outputs:
            lowered = with_margin(logits, target, margins(counts))
            total = total + F.cross_entropy(lowered, target, weight=weights)
            total = total - self.diversity * diversity(logits, passed.output, warm)
        return total

    def finish(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        assert isinstance(module, Cascade)
        with torch.no_grad():
            h = module.features(x)
            means = torch.stack([expert(h) for expert in module.experts]).cumsum(0)
            means = means / torch.arange(1, len(means) + 1)[:, None, None]
            right = means.argmax(-1) == target
        later = torch.stack([right[place + 1 :].any(0) for place in range(len(right) - 1)] or [right[0]])
        needed = (~right[: len(later)] & later).to(x)

        def needs(rows: Tensor, progress: float) -> Tensor:
            logits = torch.stack([gate(means[e, rows], h[rows]) for e, gate in enumerate(module.gates)])
            return F.binary_cross_entropy_with_logits(
                logits, needed[:, rows], pos_weight=logits.new_tensor(20.0)
            )

        if len(module.gates):
            steps = {"epochs": self.epochs, "batch_size": self.batch_size}
            minimise(module.gates.parameters(), needs, len(x), learning_rate=self.learning_rate, **steps)
