"""Apollo-MoE: a classifier of rows in several languages whose last layers have experts, one a family."""

from __future__ import annotations

from typing import Any, ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods.estimators import NetworkClassifier, Passed, minimise, perceptron, routed, router, told
from mixtura.methods.estimators._columns import NumberColumn

METHOD = {
    "paper": 91,
    "title": (
        "Efficiently Democratizing Medical LLMs for 50 Languages via a Mixture of Language Family Experts"
    ),
    "tags": ["classifies", "tabular"],
}


@final
class ApolloMoe(NetworkClassifier):
    """Classify rows of several languages (or cities, devices): shared layers first, experts of each last.

    Multilingual data, groups of rows, rare groups, language families. A dense network learns all rows; then
    the perceptrons of its last ``expert_layers`` are copied into experts. While these learn, a row always has
    the expert of its group among its ``top_k`` (router ``hybrid_language``); afterwards rows choose freely,
    so that a group need not be known, and experts of others help where theirs saw little.

    Shapes:
        ``X [n, d]``, of which ``group_column`` holds groups from 0, or -1 where unknown; ``y [n]``.
        ``predict`` does not look at the column. ``route`` gives the last layer's experts.

    Raises:
        SettingError: ``group_column`` is no column, ``families`` name experts that do not exist, ``top_k`` is
            not in [1, ``num_experts``], ``expert_layers`` in [1, ``num_layers``], or another is out of range.
        UserError: a number is missing, a group has no expert, or there is one class alone.

    Example:
        >>> import numpy as np
        >>> generator = np.random.default_rng(0)
        >>> X, group = generator.normal(size=(300, 4)), np.arange(300) % 2
        >>> y = np.where(group == 0, X[:, 0] > 0, X[:, 1] > 0)
        >>> rows = np.column_stack([X + 3 * group[:, None], group])
        >>> model = ApolloMoe(group_column=4, num_experts=2, top_k=1, epochs=30).fit(rows, y)
        >>> bool(model.score(rows, y) > 0.9)
        True

    Differences from the paper:
        Rows of a table and perceptrons in place of text and a language model; the dense network is trained
        here for as many epochs as the experts after it. Two layers, the last one of experts. A row of an
        unknown group is routed plainly in training, which the released code refuses.

    Reference:
        Efficiently Democratizing Medical LLMs for 50 Languages via a Mixture of Language Family Experts
        (paper 91); FreedomIntelligence/ApolloMoE.
    """

    ranges: ClassVar = {
        "group_column": (0, 1 << 20), "top_k": (1, 4096), "num_layers": (1, 64), "expert_layers": (1, 64),
    }  # fmt: skip

    def __init__(
        self,
        *,
        group_column: int | None = None,
        families: list[int] | None = None,
        num_experts: int = 4,
        top_k: int = 2,
        num_layers: int = 2,
        expert_layers: int = 1,
        d_hidden: int = 32,
        epochs: int = 30,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.group_column = group_column
        self.families = families
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_layers = num_layers
        self.expert_layers = expert_layers
        self.d_hidden = d_hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def build(self, d_in: int, d_out: int) -> nn.Module:
        if self.expert_layers > self.num_layers:
            raise SettingError(
                f"expert_layers of ApolloMoe must be at most num_layers, {self.num_layers}, got "
                f"{self.expert_layers}"
            )
        return _Network(d_in, d_out, self)

    def prepare(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        assert isinstance(module, _Network)
        module.group.learn(self.mean_, self.scale_)
        module.group.numbers(x)
        steps = {"epochs": self.epochs, "batch_size": self.batch_size}

        def lost(rows: Tensor, progress: float) -> Tensor:
            return F.cross_entropy(module.dense(x[rows]), target[rows])

        minimise(module.parameters(), lost, len(x), learning_rate=self.learning_rate, **steps)
        module.copy()

    def loss(self, passed: Passed, target: Int[Tensor, " T"], progress: float) -> Float[Tensor, ""]:
        return F.cross_entropy(passed.output, target)


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, d_out: int, owner: Any) -> None:
        super().__init__()
        width, num = owner.d_hidden, owner.num_experts
        last = (num if owner.families is None else len(owner.families)) - 1
        self.group = NumberColumn("groups of ApolloMoe", owner.group_column, d_in, -1, last)
        self.embed, self.head = nn.Linear(self.group.d_out, width), nn.Linear(width, d_out)
        self.layers = nn.ModuleList(perceptron(width, width, width) for _ in range(owner.num_layers))
        how = {"top_k": owner.top_k, "families": owner.families}
        seeds = range(owner.random_state, owner.random_state + owner.expert_layers)
        self.gates = nn.ModuleList(router("hybrid_language", width, num, seed, **how) for seed in seeds)
        made = (perceptron(width, width, width) for _ in range(num * owner.expert_layers))
        self.experts = nn.ModuleList(made)

    def dense(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n O"]:
        """What the network without experts says."""
        h = self.embed(self.group.features(x))
        for layer in self.layers:
            h = h + layer(h.relu())
        said: Tensor = self.head(h.relu())
        return said

    def copy(self) -> None:
        """Make every expert of a layer what the layer is."""
        num = len(self.experts) // len(self.gates)
        for place, expert in enumerate(self.experts):
            expert.load_state_dict(self.layers[place // num - len(self.gates)].state_dict())

    def forward(self, x: Float[Tensor, "n D"]) -> Passed:
        labels = {"language": self.group.numbers(x)} if self.training else {}
        h, num = self.embed(self.group.features(x)), len(self.experts) // len(self.gates)
        for layer in self.layers[: len(self.layers) - len(self.gates)]:
            h = h + layer(h.relu())
        for place, gate in enumerate(self.gates):
            routing = gate(told(h.relu(), self.training, labels=labels))
            mine = self.experts[place * num : (place + 1) * num]
            h = h + routed(mine, h.relu(), routing, h.shape[1])
        return Passed(output=self.head(h.relu()), routing=routing)
