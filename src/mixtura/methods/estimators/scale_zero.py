"""ScaleZero: one world model of many tasks, whose experts keep tasks out of each other's way."""

from __future__ import annotations

from typing import Any, ClassVar, cast, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import Passed, routed, router, told
from mixtura.methods.estimators._domains import GroupedRegressor, parted
from mixtura.methods.estimators._learning import with_gradients
from mixtura.methods.estimators._networks import SwiGlu

METHOD = {
    "paper": 34,
    "title": "One Model for All Tasks: Leveraging Efficient World Models in Multi-Task Planning",
    "tags": ["regresses", "tabular", "reads:groups"],
}


@final
class ScaleZero(GroupedRegressor):
    """Learn the dynamics of several tasks in one model: what comes of an action, by sparse experts.

    World models, multi-task planning, reinforcement learning. A row is an observation and an action, filled
    up with zeros to the widest task; targets are how the observation changes and the reward, likewise;
    ``groups`` name the task. A shared encoder, layers in which a router sends each row to one of several
    SwiGLU experts beside a shared one, and a linear head a task. `gradient_cosines` tells how far tasks pull
    the encoder in different directions, which is what experts are to lessen.

    Shapes:
        ``X [n, d]``, ``y [n]`` or ``[n, K]``, ``groups [n]``; ``route`` is that of the last layer.

    Raises:
        SettingError: ``num_layers`` is not in [1, 64], ``d_model`` in [2, 4096], or a size, rate or
            ``random_state`` out of range.
        UserError: a number is missing, or a group was not learned of.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> X, task = generator.normal(size=(300, 4)), np.repeat(["push", "pull"], 150)
        >>> y = np.where(task == "push", X[:, 0], -X[:, 0])
        >>> model = ScaleZero(epochs=20).fit(X, y, groups=task)
        >>> bool(np.corrcoef(model.predict(X, groups=task), y)[0, 1] > 0.95)
        True

    Differences from the paper:
        A model of single steps learned from transitions that are given; no planning, no latent states over
        time, and no adapters by progress, which are the adapter `scale_zero`. In the released code the weight
        of a single expert is a softmax over itself, which is 1 and teaches the gate nothing; here it is the
        expert's probability among all. Experts are half as wide as theirs for their input. A row of no task
        known has the mean of the heads.

    Reference:
        One Model for All Tasks: Leveraging Efficient World Models in Multi-Task Planning (paper 34,
        abstract); the MoE layer of opendilab/LightZero.
    """

    ranges: ClassVar = {"num_layers": (1, 64), "d_model": (2, 4096)}

    def __init__(
        self,
        *,
        num_experts: int = 8,
        num_layers: int = 1,
        d_model: int = 32,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.num_layers = num_layers
        self.d_model = d_model
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def gradient_cosines(self, X: Any, y: Any, groups: Any = None) -> np.ndarray:
        """How alike the tasks' gradients of the encoder are: a cosine for each two tasks."""
        X = self.rows(X)
        numbers = self.numbers(groups, len(X))
        targets = (self.targets(y, (len(X), self.num_outputs_)) - self.target_mean_) / self.target_scale_
        found, encoder = [], cast(_Network, self.module_).encoder
        with with_gradients():
            x, wanted = self._given(X, numbers), torch.from_numpy(targets)
            for task in range(len(self.groups_)):
                rows = torch.from_numpy(numbers == task)
                loss = F.mse_loss(self.module_(x[rows]).output, wanted[rows])
                parts = torch.autograd.grad(loss, tuple(encoder.parameters()))
                found.append(torch.cat([part.flatten() for part in parts]))
            units = F.normalize(torch.stack(found), dim=1)
        return (units @ units.T).numpy()

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return _Network(d_in, d_out, len(self.groups_), self)

    def loss(self, passed: Passed, target: Float[Tensor, "T O"], progress: float) -> Float[Tensor, ""]:
        return F.mse_loss(passed.output, target)


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, d_out: int, num_tasks: int, owner: ScaleZero) -> None:
        super().__init__()
        wide, num = owner.d_model, owner.num_layers
        self.encoder = nn.Sequential(nn.Linear(d_in, wide), nn.SiLU(), nn.Linear(wide, wide))
        self.norms = nn.ModuleList(nn.LayerNorm(wide) for _ in range(num + 1))
        self.gates = nn.ModuleList(
            router("top_k", wide, owner.num_experts, owner.random_state + layer, top_k=1, renormalize=False)
            for layer in range(num)
        )
        self.experts = nn.ModuleList(
            nn.ModuleList(SwiGlu(wide, 2 * wide) for _ in range(owner.num_experts)) for _ in range(num)
        )
        self.shared = nn.ModuleList(SwiGlu(wide, 2 * wide) for _ in range(num))
        self.heads = nn.ModuleList(nn.Linear(wide, d_out) for _ in range(num_tasks))

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        rows, tasks = parted(x)
        h = self.encoder(rows)
        layers = zip(self.norms[:-1], self.gates, self.experts, self.shared, strict=True)
        for norm, gate, experts, shared in layers:
            seen = norm(h)
            routing = gate(told(seen, self.training))
            h = h + routed(cast(nn.ModuleList, experts), seen, routing, seen.shape[1]) + shared(seen)
        said = torch.stack([head(self.norms[-1](h)) for head in self.heads], dim=1)
        own = said.gather(1, tasks.clamp(min=0)[:, None, None].expand(-1, 1, said.shape[2]))[:, 0]
        output = torch.where((tasks < 0)[:, None], said.mean(1), own)
        return Passed(output=output, routing=routing)
