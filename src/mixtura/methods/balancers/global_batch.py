"""The load balancing loss over the global batch, with counts summed over micro-batches and processes."""

from __future__ import annotations

from dataclasses import replace
from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._scores import crowding
from mixtura.methods.balancers import Balancer
from mixtura.methods.balancers._shared import load_shares, mean_scores
from mixtura.types import BalancerInput

METHOD = {
    "paper": 163,
    "title": "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized "
    "Mixture-of-Expert Models",
    "tags": ["by_load", "global_counts"],
}


@final
class GlobalBatch(Balancer):
    """Penalise experts that are too busy in the whole batch; one sequence may use few of them.

    ``coefficient * E * sum_e f_e * P_e`` with ``f_e`` the share of the assignments of the *global*
    batch that expert ``e`` gets, over all micro-batches of an optimizer step and all processes, and
    ``P_e`` its mean score over the tokens at hand. Evenness is asked for over the corpus rather than
    within each micro-batch, so experts may specialise by domain. ``micro_batch_coefficient`` adds the
    same loss with the counts of the tokens at hand, the usual implementation's: a little of it evens
    out single micro-batches.

    Shapes:
        A routing of T tokens over E experts, and the global counts ``load [E]``, to one number.

    Raises:
        SettingError: a coefficient is not in [0, 1e6].

    Example:
        >>> import torch
        >>> from mixtura.authoring.contracts._samples import sample_routing
        >>> routing = sample_routing(hot=4.0)
        >>> even = torch.full((8,), 100)
        >>> balancer = GlobalBatch(coefficient=1.0)
        >>> round(balancer.loss(BalancerInput(routing=routing, load=even)).item(), 4)
        1.0
        >>> balancer.loss(BalancerInput(routing=routing)).item() > 3
        True

    Differences from the paper:
        Only the abstract was at hand. Who trains sums the counts and hands them in as ``load``:
        `MixturaForCausalLM` and `mixtura.balance` sum those of all processes and of the step's
        micro-batches so far, or, counted ahead, of all its micro-batches. Without ``load`` the tokens at
        hand are the whole, and the loss is that of `switch_loss`. With ``micro_batch_coefficient`` above 0
        the loss depends on how the batch is cut into micro-batches.

    Reference:
        Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized
        Mixture-of-Expert Models (paper 163, abstract).
    """

    def __init__(self, *, coefficient: float = 0.01, micro_batch_coefficient: float = 0.0) -> None:
        check_range("GlobalBatch", "coefficient", coefficient, 0, 1e6)
        check_range("GlobalBatch", "micro_batch_coefficient", micro_batch_coefficient, 0, 1e6)
        self.coefficient = coefficient
        self.micro_batch_coefficient = micro_batch_coefficient

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        here = load_shares(replace(inputs, load=None))
        wanted = self.coefficient * load_shares(inputs) + self.micro_batch_coefficient * here
        return crowding(wanted, mean_scores(inputs.routing))
