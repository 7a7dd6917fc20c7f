"""The device-level balance loss: groups of experts should be equally busy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._scores import crowding
from mixtura.methods.balancers import Balancer
from mixtura.methods.balancers._shared import load_shares, mean_scores, require_runs, runs
from mixtura.types import BalancerInput, LayerShape

METHOD = {
    "paper": None,
    "title": "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    "tags": ["by_load"],
    "gaps": {"check_expert_order_is_irrelevant": "neighbouring experts share a device, so order matters"},
}


@final
class DeviceLoss(Balancer):
    """Even out groups of experts that live on one device, and leave the experts within a group free.

    Experts fall into ``num_devices`` equal runs of neighbours. The loss is ``coefficient *
    num_devices * sum_d f_d * P_d`` with ``f_d`` the share of all assignments that go to device ``d``
    and ``P_d`` the sum of its experts' mean scores. Equally busy devices are what expert parallelism
    needs; forcing every single expert to be equally busy costs quality.

    Shapes:
        A routing of T tokens over E experts to one number.

    Raises:
        SettingError: ``num_devices`` is not in [1, 1e6], or ``coefficient`` not in [0, 1e6].
        UserError: the layer's experts cannot be divided into so many equal runs.

    Example:
        >>> from mixtura.authoring.contracts._samples import sample_routing
        >>> even, skewed = (BalancerInput(routing=sample_routing(hot=hot)) for hot in (0.0, 4.0))
        >>> balancer = DeviceLoss(num_devices=4, coefficient=1.0)
        >>> balancer.loss(even).item() < 1.2 < balancer.loss(skewed).item()
        True

    Differences from the paper:
        Shares are of the assignments, so that the balanced value is ``coefficient`` whatever top-k is.
        The paper's third loss, for balanced communication, needs to know which tokens a device got at
        all and is left out.

    Reference:
        DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model.
    """

    def __init__(self, *, num_devices: int = 4, coefficient: float = 0.05) -> None:
        check_range("DeviceLoss", "num_devices", num_devices, 1, 1e6)
        check_range("DeviceLoss", "coefficient", coefficient, 0, 1e6)
        self.num_devices = num_devices
        self.coefficient = coefficient

    def start(self, shape: LayerShape) -> Mapping[str, Tensor]:
        require_runs(shape.num_experts, self.num_devices, "devices")
        return {}

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        share = runs(load_shares(inputs), self.num_devices, "devices").sum(-1)
        score = runs(mean_scores(inputs.routing), self.num_devices, "devices").sum(-1)
        return self.coefficient * crowding(share, score)
