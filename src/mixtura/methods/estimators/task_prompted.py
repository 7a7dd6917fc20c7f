"""JiuZhang 2.0's experts: one network of many tasks whose router reads a row beside the task's prompt."""

from __future__ import annotations

import copy
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods import create
from mixtura.methods.estimators import Passed, minimise, perceptron, routed, router, told
from mixtura.methods.estimators._tasks import TaskNetwork, masked_bce
from mixtura.types import BalancerInput

METHOD = {
    "paper": 194,
    "title": (
        "JiuZhang 2.0: A Unified Chinese Pre-trained Language Model for Multi-task Mathematical Problem "
        "Solving"
    ),
    "tags": ["classifies", "multi_task"],
}


@final
class TaskPrompted(TaskNetwork):
    """Say yes or no to several questions of a row by one network whose router is told the question.

    Multi-task learning with shared experts, task prompts, one model in place of a copy a task, few labels.
    Experts begin as copies of one perceptron, with a little noise. First they learn to fill in columns that
    are hidden, which needs no labels (rows of all tasks, under each task's prompt); then the tasks' labels.
    The router reads a row's feature beside a learned prompt of the task, experts the feature alone, so that
    tasks share what helps several; a loss keeps the experts evenly used.

    Shapes:
        ``X [n, d]``, ``y [n, K]`` of 0, 1 and NaN where a task has no label; ``predict_proba [n, K]``.
        ``route`` has a token for every row and task, tasks of a row together.

    Raises:
        SettingError: ``top_k`` is not in [1, ``num_experts``], ``noise`` or ``balance`` in [0, 1e3],
            ``hidden`` in [0, 1], ``first_epochs`` in [0, 1048576], or a size, rate or ``random_state`` out of
            range.
        UserError: labels are none of 0, 1 and NaN, or a task has no label of one kind.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(200, 4))
        >>> y = np.stack([X[:, 0] > 0, X[:, 1] > 0], axis=1).astype(float)
        >>> y[50:, 1] = np.nan
        >>> model = TaskPrompted(epochs=15).fit(X, y)
        >>> bool(model.score(X, y) > 0.9), model.route(X[:5]).num_tokens
        (True, 10)

    Differences from the paper:
        Only the abstract and a summary were at hand. There the network is a language model of mathematical
        text, the copied layers are those of a pre-trained one, tasks are written out, and a large model
        refines solutions in rounds (the aggregator ``iterative_refine`` here); here rows of a table, a
        perceptron drawn at random, a linear head a task. What is hidden, a share of columns, the noise, the
        loss ``switch_loss`` at 0.01 and two experts a token are our choices.

    Reference:
        JiuZhang 2.0: A Unified Chinese Pre-trained Language Model for Multi-task Mathematical Problem Solving
        (paper 194, abstract).
    """

    ranges: ClassVar = {
        "top_k": (1, 4096), "noise": (0, 1e3), "balance": (0, 1e3), "hidden": (0, 1),
        "first_epochs": (0, 1 << 20),
    }  # fmt: skip

    def __init__(
        self,
        *,
        num_experts: int = 4,
        top_k: int = 2,
        d_hidden: int = 32,
        noise: float = 0.01,
        balance: float = 0.01,
        hidden: float = 0.15,
        first_epochs: int = 20,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.d_hidden = d_hidden
        self.noise = noise
        self.balance = balance
        self.hidden = hidden
        self.first_epochs = first_epochs
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return _Network(d_in, d_out, self)

    def prepare(self, module: nn.Module, x: Tensor, target: Tensor) -> None:
        assert isinstance(module, _Network)
        if self.first_epochs:
            minimise(
                module.parameters(),
                lambda rows, _: self._fill_in(module, x[rows]),
                len(x),
                epochs=self.first_epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
            )

    def _fill_in(self, module: _Network, x: Float[Tensor, "T D"]) -> Float[Tensor, ""]:
        """How far what is said of hidden columns is from what they held."""
        is_hidden = torch.rand_like(x) < self.hidden
        passed = module(x.masked_fill(is_hidden, 0.0))
        missed = (module.decode(passed.more) - x[:, None]).square() * is_hidden[:, None]
        mean: Tensor = missed.sum() / (is_hidden.sum() * module.num_tasks).clamp(min=1)
        return mean + self._even(passed)

    def _even(self, passed: Passed) -> Float[Tensor, ""]:
        even = create("balancers", "switch_loss", coefficient=self.balance)
        lost: Tensor = even.loss(BalancerInput(routing=passed.routing))
        return lost

    def loss(self, passed: Passed, target: Float[Tensor, "T K"], progress: float) -> Float[Tensor, ""]:
        return masked_bce(passed.output, target) + self._even(passed)


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, num_tasks: int, owner: TaskPrompted) -> None:
        super().__init__()
        width, self.num_tasks = owner.d_hidden, num_tasks
        self.embed, self.decode = nn.Linear(d_in, width), nn.Linear(width, d_in)
        self.prompts = nn.Parameter(torch.randn(num_tasks, width))
        self.gate = router("top_k", 2 * width, owner.num_experts, owner.random_state, top_k=owner.top_k)
        first = perceptron(width, width, width)
        self.experts = nn.ModuleList(copy.deepcopy(first) for _ in range(owner.num_experts))
        for weight in self.experts.parameters():
            weight.data += owner.noise * weight.abs().mean() * torch.randn_like(weight)
        self.heads = nn.Parameter(torch.randn(num_tasks, width) / width**0.5)
        self.biases = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        h = self.embed(x).relu().repeat_interleave(self.num_tasks, dim=0)
        asked = torch.cat([h, self.prompts.repeat(len(x), 1)], dim=-1)
        routing = self.gate(told(asked, self.training))
        made = F.relu(h + routed(self.experts, h, routing, h.shape[1]))
        z = made.reshape(len(x), self.num_tasks, -1)
        return Passed(output=(z * self.heads).sum(-1) + self.biases, routing=routing, more=z)
