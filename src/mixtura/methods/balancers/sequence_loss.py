"""The sequence-wise balance loss: each sequence should use all experts."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._precision import exact
from mixtura.methods._scores import to_sum_one
from mixtura.methods.balancers import Balancer
from mixtura.methods.balancers._shared import needed
from mixtura.types import BalancerInput

METHOD = {
    "paper": None,
    "title": "DeepSeek-V3 Technical Report",
    "tags": ["whole_sequences", "by_load", "reads:sequence_ids"],
}


@final
class SequenceLoss(Balancer):
    """Penalise sequences whose tokens crowd on few experts, by the balance loss of each sequence.

    For each sequence ``E * sum_e f_e * P_e``: ``f_e`` is expert ``e``'s share of the sequence's
    assignments, ``P_e`` the mean over its tokens of the expert's score over the token's summed scores,
    so that sigmoid scores may be used. The mean over sequences, weighted by their valid tokens, times
    ``coefficient``. Meant as a small complement to a bias that evens out the whole batch; a large
    coefficient keeps experts from specialising.

    Shapes:
        Scores ``[T, E]`` (none negative) and the sequence of each token ``[T]`` to one number.

    Raises:
        SettingError: ``coefficient`` is not in [0, 1e6].
        UserError: sequence ids were not given.

    Example:
        >>> from mixtura.authoring.contracts._samples import sample_routing
        >>> ids = torch.arange(64) // 8
        >>> inputs = BalancerInput(routing=sample_routing(), sequence_ids=ids)
        >>> SequenceLoss(coefficient=1.0).loss(inputs).item() > 1
        True

    Differences from the paper:
        Sequences count by their tokens rather than alike, so that micro-batches of whole sequences
        average to the loss of the batch. What a capacity limit dropped does not count, since it is known of
        the batch alone and not of each sequence; the other balancers count it.

    Reference:
        DeepSeek-V3 Technical Report.
    """

    def __init__(self, *, coefficient: float = 0.0001) -> None:
        check_range("SequenceLoss", "coefficient", coefficient, 0, 1e6)
        self.coefficient = coefficient

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        routing = inputs.routing
        ids = needed(inputs, "sequence_ids", "SequenceLoss")
        num_sequences = int(ids.max()) + 1 if ids.numel() else 0
        scores = torch.where(routing.valid[:, None], to_sum_one(exact(routing.scores)), 0.0)
        summed = scores.new_zeros(num_sequences, routing.num_experts).index_add(0, ids, scores)
        counts = torch.bincount(
            ids[routing.token_ids] * routing.num_experts + routing.expert_ids,
            minlength=num_sequences * routing.num_experts,
        ).view(num_sequences, routing.num_experts)
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        # Summed scores are the mean times the sequence's tokens: its weight among the sequences.
        return (
            self.coefficient * routing.num_experts * (share * summed).sum() / routing.valid.sum().clamp(min=1)
        )
