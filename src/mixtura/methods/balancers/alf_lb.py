"""Bias updates as a primal-dual method: steps proportional to what an expert lacks, on a schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.balancers import Balancer
from mixtura.methods.balancers._shared import lack
from mixtura.types import BalancerInput, LayerShape

METHOD = {
    "paper": 134,
    "title": "A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of Sparse Mixture-of-Experts in "
    "Large-Scale AI Models",
    "tags": ["reads:step"],
}


@final
class AlfLb(Balancer):
    """Move each expert's bias by a step times what it lacks: gradient descent on an assignment's dual.

    Sending every token to the experts that suit it best, no expert more than its share, is an
    assignment problem whose dual variables are the biases. Choosing by score plus bias is its primal
    step, ``bias += step * (share - load) / share`` its dual step. With step ``step_size`` at every
    optimizer step (``schedule="constant"``), ``step_size / sqrt(n)`` (``"inverse_sqrt"``) or
    ``step_size / n`` (``"inverse"``, the schedule of logarithmic regret) at the n-th.

    In theory, and in this project's tests: for fixed scores and small steps the Lagrangian falls from
    step to step; a token leaves an expert only for one that was less loaded; loads end near balance.

    Shapes:
        State ``bias [E]`` in float32.

    Raises:
        SettingError: ``step_size`` is not in [0, 100], or ``schedule`` is unknown.

    Example:
        >>> from mixtura.authoring.contracts._samples import sample_routing
        >>> routing = sample_routing(hot=4.0)
        >>> balancer = AlfLb(step_size=0.1, schedule="inverse")
        >>> state = balancer.start(LayerShape(d_model=4, d_expert=4, num_experts=8))
        >>> first = balancer.update(BalancerInput(routing=routing, state=state, step=0))["bias"]
        >>> tenth = balancer.update(BalancerInput(routing=routing, state=state, step=9))["bias"]
        >>> torch.allclose(first, 10 * tenth), first[0] < 0
        (True, tensor(True))

    Differences from the paper:
        Only the abstract was at hand. What an expert lacks is a share of the mean load, so that
        ``step_size`` does not depend on the batch size. Steps of one size for all experts; the sign rule
        of paper 112, a step of ``rate`` over the error's size, is `loss_free`.

    Reference:
        A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of Sparse Mixture-of-Experts in
        Large-Scale AI Models (paper 134, abstract).
    """

    def __init__(
        self,
        *,
        step_size: float = 0.02,
        schedule: Literal["constant", "inverse_sqrt", "inverse"] = "inverse_sqrt",
    ) -> None:
        check_range("AlfLb", "step_size", step_size, 0, 100)
        self.step_size = step_size
        self.schedule = schedule

    def start(self, shape: LayerShape) -> Mapping[str, Tensor]:
        return {"bias": torch.zeros(shape.num_experts, dtype=torch.float32)}

    def update(self, inputs: BalancerInput) -> Mapping[str, Tensor]:
        count = inputs.step + 1
        divisor = {"constant": 1.0, "inverse_sqrt": math.sqrt(count), "inverse": float(count)}
        step = self.step_size / divisor[self.schedule]
        return {"bias": inputs.state["bias"] + step * lack(inputs)}
