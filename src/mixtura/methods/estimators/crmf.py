"""CRMF: experts in hyperbolic, spherical and flat space, fused where all of them are flat."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import NetworkRegressor, Passed, dense_routing, perceptron
from mixtura.methods.estimators._geometry import exp_ball, exp_sphere, log_ball, log_sphere, mobius_add

METHOD = {
    "paper": 51,
    "title": (
        "RecruitView: A Multimodal Dataset for Predicting Personality and Interview Performance for Human "
        "Resources Applications"
    ),
    "tags": ["regresses", "tabular"],
}


@final
class Crmf(NetworkRegressor):
    """Regress several numbers by three experts, each in a geometry of its own, weighed row by row.

    Cross-modal regression with manifold fusion: hyperbolic space for hierarchies, a sphere for directions,
    flat space for what varies evenly. A perceptron makes features; each expert carries them into its space by
    the exponential map, moves them by a linear map and a shift of that space, and takes them back by the
    logarithm. A softmax of the features weighs the three, and a linear map reads their sum.

    Shapes:
        ``X [n, d]``, ``y [n]`` or ``[n, K]``; ``route`` gives three weights a row: ball, sphere, flat.

    Raises:
        SettingError: ``curvature`` is not in [1e-6, 1e3], or a size, rate or ``random_state`` out of range.
        UserError: a number is missing.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = Crmf(epochs=20).fit(X[:300], y[:300])
        >>> bool(model.score(X[300:], y[300:]) > 0.3), model.route(X).scores.shape
        (True, torch.Size([442, 3]))

    Differences from the paper:
        The abstract names the spaces, the routing and the fusion in a tangent space; formulas are ours. Rows
        of numbers in place of a person's video, sound and words. Of the hyperbolic map it is the shift that
        is not flat: a linear map alone, taken into the ball and back, is the same linear map.

    Reference:
        RecruitView: A Multimodal Dataset for Predicting Personality and Interview Performance for Human
        Resources Applications (paper 51, abstract).
    """

    ranges: ClassVar = {"curvature": (1e-6, 1e3)}

    def __init__(
        self,
        *,
        d_hidden: int = 32,
        curvature: float = 1.0,
        epochs: int = 60,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.d_hidden = d_hidden
        self.curvature = curvature
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return _Network(d_in, d_out, self.d_hidden, self.curvature)

    def loss(self, passed: Passed, target: Float[Tensor, "T O"], progress: float) -> Float[Tensor, ""]:
        return F.mse_loss(passed.output, target)


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, d_out: int, width: int, curvature: float) -> None:
        super().__init__()
        self.curvature = curvature
        self.features = nn.Sequential(perceptron(d_in, width), nn.ReLU(), nn.Linear(width, width))
        self.ball, self.flat = nn.Linear(width, width), nn.Linear(width, width)
        self.sphere = nn.Linear(width + 1, width + 1)
        self.gate = nn.Linear(width, 3)
        self.head = nn.Linear(width, d_out)

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        h, c = self.features(x), self.curvature
        shift = exp_ball(self.ball.bias[None], c)
        ball = mobius_add(exp_ball(h @ self.ball.weight.T, c), shift, c)
        sphere = F.normalize(self.sphere(exp_sphere(h, c)), dim=-1)
        flat = torch.stack([log_ball(ball, c), log_sphere(sphere, c), self.flat(h)])
        logits = self.gate(h)
        weights = logits.softmax(-1)
        fused = torch.einsum("te,etd->td", weights, flat)
        return Passed(output=self.head(fused), routing=dense_routing(weights, logits), outputs=flat)
