"""Pruning by how often, how strongly and how much: a family of scores with exponents."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError, check_range
from mixtura.methods.pruners import Pruner
from mixtura.methods.pruners._shared import keep_best
from mixtura.types import Budget, Plan
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": None,
    "title": "Frequency, gate and output norm with exponents: the criteria of pruning papers as one family",
    "tags": ["statistic:output_norm", "statistic:weighted_output_norm"],
}
_LARGEST = 16


@final
class FrequencyGateNorm(Pruner):
    """Drop the experts whose frequency, routing weight and output norm, each to a power, multiply to least.

    The score is ``frequency^a * (gate^b * norm^c)``: how many tokens chose the expert, and means over those
    tokens of their routing weights and of the norms of its outputs. What gate and norm have in common,
    ``(gate * norm)^min(b, c)``, is the mean of the products token by token; the rest is of the plain mean.
    So known criteria are points of the family:

    ======  ===========================================  ================================================
    a b c   criterion                                    name in REAP's code
    ======  ===========================================  ================================================
    1 0 0   frequency                                    ``frequency``
    0 1 0   mean routing weight                          none
    1 1 0   sum of routing weights                       ``weighted_expert_frequency_sum``
    0 0 1   mean output norm (EAN)                       ``ean_mean``
    1 0 1   sum of output norms                          ``ean_sum``
    0 1 1   REAP                                         ``reap``
    1 1 1   sum of weighted output norms                 ``weighted_ean_sum``
    ======  ===========================================  ================================================

    Shapes:
        A trace of L layers to the same number of experts dropped in each.

    Raises:
        BudgetError: fewer experts than routing needs would be left.
        SettingError: an exponent is not in [0, 16], or all are 0.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> trace, budget = sample_trace(seed=0, num_experts=4), Budget(num_experts=3)
        >>> reap = FrequencyGateNorm(frequency=0, gate=1, norm=1).plan(trace, budget)
        >>> norms = FrequencyGateNorm(frequency=0, gate=0, norm=1).plan(trace, budget)
        >>> [action.experts for action in reap.actions], [action.experts for action in norms.actions]
        ([(0,), (3,)], [(3,), (3,)])

    Differences from the paper:
        There is no one paper. Of an expert that no token chose every mean is 0. Domains are pooled by
        their number of tokens. Weights are those that the router really used.

    Reference:
        The criteria of REAP's code (paper 136), CerebrasResearch/reap at 1970473, ``pruning_metrics.py``.
    """

    def __init__(self, *, frequency: float = 1.0, gate: float = 1.0, norm: float = 1.0) -> None:
        for name, value in (("frequency", frequency), ("gate", gate), ("norm", norm)):
            check_range("FrequencyGateNorm", name, value, 0, _LARGEST)
        if not (frequency or gate or norm):
            raise SettingError("one of frequency, gate and norm of FrequencyGateNorm must be above 0")
        self.frequency = frequency
        self.gate = gate
        self.norm = norm

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        return keep_best(trace, budget, [self._score(layer) for layer in trace.layers])

    def _score(self, layer: LayerTrace) -> Float[Tensor, " E"]:
        load = layer.load.double()
        gate = layer.weight_sums.double().sum(0).abs() / load.clamp(min=1)
        norm = layer.statistic("output_norm").double()
        both = layer.statistic("weighted_output_norm").double()
        common = min(self.gate, self.norm)
        # Shares of the tokens, so that large powers of large counts stay finite.
        seen = load / load.sum().clamp(min=1)
        score = seen**self.frequency * both**common
        return score * gate ** (self.gate - common) * norm ** (self.norm - common)
