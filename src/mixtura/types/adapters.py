"""What an adapter works with: the place in a model that it changes, and what it makes of the matrices there.

Import the records from `mixtura.types`, which also has the legend of shape letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class MatrixShape:
    """Sizes of a matrix of the base: of every expert's where there are experts.

    ``transposed``: it is stored as ``[cols, rows]``.
    """

    rows: int
    cols: int
    transposed: bool = False

    @property
    def stored(self) -> tuple[int, int]:
        """The shape in which it is stored."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place in a model that an adapter changes: a linear layer, or all experts of a layer.

    Attributes:
        name: the module's name in the plain model.
        kind: ``linear`` or ``experts``.
        layer: the decoder layer's number.
        num_layers: L, decoder layers of the model.
        matrices: by name what can be changed: ``weight`` of a linear layer; of experts ``up``, which is gate
            and up projection in one matrix where there is a gate, and ``down``.
        num_experts: E; 0 for a linear layer.
    """

    name: str
    kind: Literal["linear", "experts"]
    layer: int
    num_layers: int
    matrices: Mapping[str, MatrixShape]
    num_experts: int = 0


@final
@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to M matrices of one shape: ``scale[m] * b[m] @ a[m]``, as ``[rows, cols]``."""

    a: Float[Tensor, "M R cols"]
    b: Float[Tensor, "M rows R"]
    scale: Float[Tensor, " M"]


@final
@dataclass(frozen=True, slots=True)
class Own:
    """M matrices that stand in the place of the base's, stored as those are."""

    weight: Float[Tensor, "M _ _"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an adapter makes of the matrices at its site.

    Attributes:
        matrices: by the name that `Site.matrices` has. A matrix that is not named stays the base's.
        expert_ids: of a site of experts, whose matrices the M entries belong to; each once, in any order.
        shares: of a linear layer, how much of each of the M additions a token gets: 0 for none of it. None:
            all of every one.
        base_scale: of a linear layer, a factor of what the base computes. None: 1.
        losses: what to add to the training loss, by name, already multiplied by its coefficient.
        dropout: share of a token's features that the factors of `LowRank` do not see; the core fills it in,
            in training.
    """

    matrices: Mapping[str, LowRank | Own]
    expert_ids: tuple[int, ...] = ()
    shares: Float[Tensor, "T M"] | None = None
    base_scale: Float[Tensor, ""] | None = None
    losses: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    dropout: float = 0.0
