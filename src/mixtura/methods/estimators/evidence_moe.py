"""EvidenceMoE: experts on parts of a signal, and critics that say how far each is to be trusted."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import NetworkRegressor, Passed, dense_routing, perceptron
from mixtura.methods.estimators._evidence import squared_error, wrong_evidence

METHOD = {
    "paper": 0,
    "title": (
        "EvidenceMoE: A Physics-Guided Mixture-of-Experts with Evidential Critics for Advancing Fluorescence "
        "Light Detection and Ranging in Scattering Media"
    ),
    "tags": ["regresses", "tabular"],
}


@final
class EvidenceMoe(NetworkRegressor):
    """Regress from a signal by experts on its beginning, its end and all of it, weighed by critics of each.

    Time-of-flight curves, decays, spectra: columns are in the order of time. Each expert predicts everything;
    its critic sees what the expert saw and said, and gives evidence for "good" and "bad" as a Dirichlet
    distribution, and a correction. A decider weighs the corrected predictions by qualities, uncertainties and
    the predictions. While learning, an expert was good on a row if its error is below the minibatch's median.

    Shapes:
        ``X [n, d]``, ``y [n]`` or ``[n, K]``; ``route`` gives three weights a row: early, late, all.

    Raises:
        SettingError: ``evidence`` is not in [0, 1e3], or a size, rate or ``random_state`` out of range.
        UserError: a number is missing.

    Example:
        >>> import numpy as np
        >>> rates = np.random.default_rng(0).uniform(0.5, 2, 200)
        >>> X = np.exp(-rates[:, None] * np.linspace(0, 2, 16))
        >>> model = EvidenceMoe(epochs=10).fit(X, rates)
        >>> bool(model.score(X, rates) > 0.8), model.qualities(X).shape
        (True, (200, 3))

    Differences from the paper:
        The abstract names experts, critics and decider; formulas are ours. The physics of the experts is
        which part of the signal they see (early photons tell depth, late ones lifetime); they solve no
        transport equation. The evidential loss is an expected squared error, and a divergence from no
        evidence that sets in along the training.

    Reference:
        EvidenceMoE: A Physics-Guided Mixture-of-Experts with Evidential Critics for Advancing Fluorescence
        Light Detection and Ranging in Scattering Media (paper 0, abstract).
    """

    ranges: ClassVar = {"evidence": (0, 1e3)}

    def __init__(
        self,
        *,
        d_hidden: int = 24,
        evidence: float = 0.1,
        epochs: int = 60,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.d_hidden = d_hidden
        self.evidence = evidence
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def qualities(self, X: Any) -> np.ndarray:
        """How good each expert is believed to be on each row, in [0, 1]."""
        alpha = self.run(X).more
        said: np.ndarray = (alpha[..., 0] / alpha.sum(-1)).T.numpy()
        return said

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return _Network(d_in, d_out, self.d_hidden)

    def loss(self, passed: Passed, target: Float[Tensor, "T O"], progress: float) -> Float[Tensor, ""]:
        assert passed.outputs is not None
        errors = (passed.outputs - target).square().mean(-1)
        good = (errors.detach() <= errors.detach().median()).to(target)
        wanted, alpha = torch.stack([good, 1 - good], dim=-1).flatten(0, 1), passed.more.flatten(0, 1)
        judged = squared_error(alpha, wanted) + progress * wrong_evidence(alpha, wanted)
        return F.mse_loss(passed.output, target) + errors.mean() + self.evidence * judged.mean()


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, d_out: int, width: int) -> None:
        super().__init__()
        half = (d_in + 1) // 2
        self.parts = (slice(0, half), slice(d_in - half, d_in), slice(0, d_in))
        sizes = (half, half, d_in)
        self.experts = nn.ModuleList(perceptron(size, width, d_out) for size in sizes)
        self.critics = nn.ModuleList(perceptron(size + d_out, width, 2 + d_out) for size in sizes)
        self.decider = perceptron(3 * (2 + d_out), width, 3)

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        outputs = torch.stack([e(x[:, part]) for e, part in zip(self.experts, self.parts, strict=True)])
        # Critics judge predictions and do not shape them.
        seen = [torch.cat([x[:, p], o.detach()], -1) for p, o in zip(self.parts, outputs, strict=True)]
        said = torch.stack([critic(one) for critic, one in zip(self.critics, seen, strict=True)])
        alpha, corrected = 1 + F.softplus(said[..., :2]), outputs + said[..., 2:]
        total = alpha.sum(-1, keepdim=True)
        facts = torch.cat([alpha[..., :1] / total, 2 / total, outputs.detach()], dim=-1)
        logits = self.decider(facts.transpose(0, 1).flatten(1))
        weights = logits.softmax(-1)
        output = torch.einsum("te,eto->to", weights, corrected)
        return Passed(output=output, routing=dense_routing(weights, logits), outputs=outputs, more=alpha)
