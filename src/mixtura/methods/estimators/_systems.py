"""Families of dynamical systems: contexts of environments, a gate over them, equations that are solved."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods.estimators._domains import parted
from mixtura.methods.estimators._networks import Passed, perceptron, router, told
from mixtura.methods.estimators._training import minimise
from mixtura.types import Routing


def solved(field: Any, x: Float[Tensor, "T D"], context: Float[Tensor, "T C"]) -> Float[Tensor, "T D"]:
    """The states after a step of length 1 along a vector field, by Runge and Kutta's fourth-order rule."""

    def slope(state: Tensor) -> Tensor:
        made: Tensor = field(torch.cat([state, context], dim=1))
        return made

    first = slope(x)
    second = slope(x + first / 2)
    third = slope(x + second / 2)
    return x + (first + 2 * second + 2 * third + slope(x + third)) / 6


def states_of(X: Any, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States and those one step later.

    Raises:
        UserError: targets are not states as rows are.
    """
    X = np.asarray(X, float)
    if y.shape != X.shape:
        raise UserError(
            f"targets of SystemFamily are states, of shape {X.shape} like the rows, got {y.shape}"
        )
    return X, y


@final
class Family(nn.Module):
    """Experts that are vector fields, and a context a environment by which the gate chooses one."""

    def __init__(self, d_in: int, num_environments: int, owner: Any) -> None:
        super().__init__()
        width, d_context = owner.d_hidden, owner.d_context
        self.contexts = nn.Parameter(0.1 * torch.randn(num_environments, d_context))
        self.gate = router("mixer_gate", d_context, owner.num_experts, owner.random_state)
        self.experts = nn.ModuleList(
            perceptron(d_in + d_context, width, width, d_in) for _ in range(owner.num_experts)
        )

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        """The next states of rows, each by its environment's context; the mean one where that is unknown."""
        rows, environments = parted(x)
        contexts = self.of(self.contexts, environments)
        routing = self.routing(contexts)
        return Passed(output=self.moved(rows, contexts, routing), routing=routing)

    def of(self, contexts: Float[Tensor, "N C"], environments: Tensor) -> Float[Tensor, "T C"]:
        """Each row's context."""
        own = contexts[environments.clamp(min=0)]
        return torch.where((environments < 0)[:, None], contexts.mean(0), own)

    def routing(self, contexts: Float[Tensor, "T C"]) -> Routing:
        """Which expert each context has."""
        made: Routing = self.gate(told(contexts, self.training))
        return made

    def moved(
        self, x: Float[Tensor, "T D"], contexts: Float[Tensor, "T C"], routing: Routing, fixed: bool = False
    ) -> Float[Tensor, "T D"]:
        """The next states; with ``fixed`` experts have no gradient of their own."""
        output = x.new_zeros(x.shape)
        ends = routing.offsets.tolist()
        for number, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > begin:
                rows = routing.token_ids[begin:end]
                made = solved(self._field(number, fixed), x[rows], contexts[rows])
                output = output.index_add(0, rows, made * routing.weights[begin:end, None])
        return output

    def in_turns(self, x: Float[Tensor, "T D"], wanted: Tensor, of_contexts: bool) -> Float[Tensor, ""]:
        """The squared error, of contexts with experts fixed, or of experts with contexts fixed."""
        rows, environments = parted(x)
        contexts = self.of(self.contexts if of_contexts else self.contexts.detach(), environments)
        return F.mse_loss(self.moved(rows, contexts, self.routing(contexts), of_contexts), wanted)

    @torch.no_grad()
    def refit(self, x: Float[Tensor, "T D"], wanted: Tensor, seed: int) -> bool:
        """Solve for the gate anew from each environment's error under each expert; False if it cannot be."""
        num = len(self.experts)
        if len(self.contexts) < num or num == 1:
            return False
        rows, environments = parted(x)
        contexts = self.contexts[environments]
        losses = torch.zeros(len(self.contexts), num, dtype=x.dtype)
        counts = torch.bincount(environments, minlength=len(self.contexts)).clamp(min=1)
        for number, expert in enumerate(self.experts):
            errors = (solved(expert, rows, contexts) - wanted).square().mean(1)
            losses[:, number] = losses[:, number].index_add(0, environments, errors) / counts
        generator = torch.Generator().manual_seed(seed)
        return bool(self.gate.refit(self.contexts, losses, generator))

    def fitted_context(self, x: Float[Tensor, "T D"], wanted: Tensor, owner: Any) -> Float[Tensor, " C"]:
        """The context of an environment that was not learned of, with everything else fixed."""
        new = nn.Parameter(self.contexts.detach().mean(0))

        def loss(rows: Tensor, progress: float) -> Tensor:
            contexts = new.expand(len(rows), -1)
            said = self.moved(x[rows], contexts, self.routing(contexts), fixed=True)
            return F.mse_loss(said, wanted[rows])

        how = {"batch_size": owner.batch_size, "learning_rate": owner.learning_rate}
        minimise([new], loss, len(x), epochs=owner.epochs, **how)
        return new.detach()

    def _field(self, number: int, fixed: bool) -> Any:
        expert = self.experts[number]
        if not fixed:
            return expert
        held = {name: one.detach() for name, one in expert.named_parameters()}
        return lambda rows: functional_call(expert, held, (rows,))
