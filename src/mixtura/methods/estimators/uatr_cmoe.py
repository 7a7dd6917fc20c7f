"""CMoE of underwater sounds: linear experts on shared features, one a row, chosen by a sigmoid."""

from __future__ import annotations

from typing import Any, ClassVar, final

from jaxtyping import Float
from torch import Tensor, nn

from mixtura.methods import create
from mixtura.methods.estimators import NetworkClassifier, Passed, perceptron, routed, router, told
from mixtura.types import BalancerInput

METHOD = {
    "paper": 58,
    "title": (
        "Unraveling Complex Data Diversity in Underwater Acoustic Target Recognition through "
        "Convolution-based Mixture of Experts"
    ),
    "tags": ["classifies", "tabular"],
}


@final
class UatrCmoe(NetworkClassifier):
    """Classify rows by one linear expert each, which a sigmoid gate on shared features chooses.

    Convolution experts for ship noise, recordings, spectra; a small mixture of linear classifiers for any
    table. A perceptron makes features of a row; the expert of the highest sigmoid score reads them, and is
    not weighted by its score, so that the balance loss alone teaches the gate. A shared linear classifier is
    added where ``residual``.

    Shapes:
        ``X [n, d]``, ``y [n]``; ``predict_proba`` gives ``[n, classes]``, ``route`` one expert a row.

    Raises:
        SettingError: ``num_experts`` is not in [1, 4096], ``d_hidden`` in [1, 65536], ``balance`` in [0,
            1e6], ``epochs``, ``batch_size``, ``learning_rate`` or ``random_state`` out of range.
        UserError: a number is missing, or there is one class alone.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = UatrCmoe(epochs=30).fit(X, y)
        >>> bool(model.score(X, y) > 0.9), int(model.route(X).load.sum())
        (True, 150)

    Differences from the paper:
        Features come from a perceptron of one hidden layer in place of a convolutional network on spectra,
        and are trained with the experts. There the number of experts is 4 or 8; here it is 4. Adam with a
        falling rate, 60 epochs.

    Reference:
        Unraveling Complex Data Diversity in Underwater Acoustic Target Recognition through Convolution-based
        Mixture of Experts (paper 58, abstract); ``xy980523/UATR-CMoE``, where the gate is not multiplied in
        either.
    """

    ranges: ClassVar = {"balance": (0, 1e6)}

    def __init__(
        self,
        *,
        num_experts: int = 4,
        d_hidden: int = 32,
        balance: float = 0.01,
        residual: bool = True,
        epochs: int = 60,
        batch_size: int = 32,
        learning_rate: float = 0.01,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.d_hidden = d_hidden
        self.balance = balance
        self.residual = residual
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return _Network(d_in, d_out, self)

    def loss(self, passed: Passed, target: Any, progress: float) -> Float[Tensor, ""]:
        even = create("balancers", "switch_loss", coefficient=self.balance)
        value: Tensor = even.loss(BalancerInput(routing=passed.routing))
        return nn.functional.cross_entropy(passed.output, target) + value


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, d_out: int, owner: UatrCmoe) -> None:
        super().__init__()
        width, num = owner.d_hidden, owner.num_experts
        self.num_outputs = d_out
        self.features = nn.Sequential(perceptron(d_in, width), nn.ReLU())
        self.gate = router("normalized_sigmoid", width, num, owner.random_state, top_k=1)
        self.experts = nn.ModuleList(nn.Linear(width, d_out) for _ in range(num))
        self.shared = nn.Linear(width, d_out) if owner.residual else None

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        h = self.features(x)
        routing = self.gate(told(h, self.training))
        output = routed(self.experts, h, routing, self.num_outputs)
        if self.shared is not None:
            output = output + self.shared(h)
        return Passed(output=output, routing=routing)
