"""What an adapter works with: the place in a model that it changes, and what it makes of the matrices there.

Import the records from `mixtura.types`, which also has the legend of shape letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from jaxtyping import Bool, Float
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
    """One place in a model that an adapter changes: a linear layer, all experts of a layer, or a dense block.

    Attributes:
        name: the module's name in the plain model.
        kind: ``linear``, ``experts``, or ``block``, a feed-forward part of three linear layers.
        layer: the decoder layer's number.
        num_layers: L, decoder layers of the model.
        matrices: by name what can be changed: ``weight`` of a linear layer; of experts ``up``, which is gate
            and up projection in one matrix where there is a gate, and ``down``; of a block ``gate``, ``up``
            and ``down``.
        num_experts: E; 0 where there are no experts.
        peers: the names of the sites that share something with this one, itself included, in the model's
            order; none where the method shares nothing.
    """

    name: str
    kind: Literal["linear", "experts", "block"]
    layer: int
    num_layers: int
    matrices: Mapping[str, MatrixShape]
    num_experts: int = 0
    peers: tuple[str, ...] = ()

    @property
    def place(self) -> int:
        """Which of its peers this is."""
        return self.peers.index(self.name) if self.peers else 0


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
            all of every one. Of a block with M experts, the weights of their outputs, which sum to 1.
        tokens: of a site of experts, the tokens whose rows meet what is added. None: all.
        base_scale: of a linear layer, a factor of what the base computes. None: 1.
        extra: of a linear layer, what is added to its output besides.
        state: one row a token, handed on to the sites that share something with this one and run after it.
        history: what the site is to know of these sequences when their later tokens come: tensors whose first
            axis is the sequence.
        losses: what to add to the training loss, by name, already multiplied by its coefficient. The core
            takes the mean over the sites.
        dropout: share of a token's features that the factors of `LowRank` do not see; the core fills it in,
            in training.
    """

    matrices: Mapping[str, LowRank | Own]
    expert_ids: tuple[int, ...] = ()
    shares: Float[Tensor, "T M"] | None = None
    tokens: Bool[Tensor, " T"] | None = None
    base_scale: Float[Tensor, ""] | None = None
    extra: Float[Tensor, "T rows"] | None = None
    state: Float[Tensor, "T *_"] | None = None
    history: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    dropout: float = 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where training is when an optimizer's step is to be made, and what a site met since the last one.

    Attributes:
        step: steps made before.
        num_steps: steps there will be.
        loads: what each expert got: of the base's experts the sum of its weights, of an adapter's own how
            often a token's share of it was not 0. None where the method does not ask for it.
        moment: the sum of the outer products of what the site was given. None where it is not asked for.
        num_tokens: tokens that both are over, padding left out.
    """

    step: int
    num_steps: int
    loads: Float[Tensor, " E"] | None = None
    moment: Float[Tensor, "cols cols"] | None = None
    num_tokens: int = 0
