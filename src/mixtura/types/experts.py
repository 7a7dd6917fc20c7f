"""What the experts of a layer are to its core: tensors that it multiplies with, or rows that they compute.

Import the records from `mixtura.types`, which also has the legend of shape letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.types.inputs import RouterInput

Curve = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True, slots=True)
class Matrices:
    """Experts as plain tensors, which the core runs, reads and merges.

    Expert e computes ``down[e] @ activation(gate_up[e] @ prepare(x) + up_bias[e]) + down_bias[e]``.

    Attributes:
        gate_up: the matrices that read a token; where ``gated`` the gates' rows come first and R = 2F,
            else R = F.
        down: the matrices that write the output.
        activation: from R features to F, row by row.
        gated: whether the first half of the features is a gate.
        up_bias, down_bias: added after each product; None for none.
        prepare: what is made of a token before any expert reads it; None for nothing.
    """

    gate_up: Float[Tensor, "E R D"]
    down: Float[Tensor, "E D F"]
    activation: Curve
    gated: bool = True
    up_bias: Float[Tensor, "E R"] | None = None
    down_bias: Float[Tensor, "E D"] | None = None
    prepare: Curve | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The assignments that experts compute, sorted by expert; those of one expert are in the tokens' order.

    Attributes:
        x: all tokens, so that what experts share is computed once a token.
        token_ids, expert_ids: of each assignment.
        offsets: end of each expert's run of assignments.
        inputs: what else is known of the tokens; its ``history`` is what these experts returned before.
    """

    x: Float[Tensor, "T D"]
    token_ids: Int[Tensor, " N"]
    expert_ids: Int[Tensor, " N"]
    offsets: Int[Tensor, " E"]
    inputs: RouterInput

    @staticmethod
    def of(
        x: Float[Tensor, "T D"],
        token_ids: Int[Tensor, " N"],
        expert_ids: Int[Tensor, " N"],
        num_experts: int,
        inputs: RouterInput | None = None,
    ) -> Rows:
        """Rows of assignments that are sorted by expert already."""
        offsets = torch.bincount(expert_ids, minlength=num_experts).cumsum(0)
        return Rows(
            x=x,
            token_ids=token_ids,
            expert_ids=expert_ids,
            offsets=offsets,
            inputs=inputs or RouterInput.of(x),
        )

    @property
    def gathered(self) -> Float[Tensor, "N D"]:
        """The token of each assignment."""
        return self.x.index_select(0, self.token_ids)


@final
@dataclass(frozen=True, slots=True)
class Ran:
    """What experts made of their rows, not weighted, and what they remember for later tokens.

    ``history`` are tensors whose first axis is the sequence.
    """

    outputs: Float[Tensor, "N D"]
    history: Mapping[str, Tensor] = field(default_factory=dict)
