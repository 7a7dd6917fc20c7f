"""How a choice of experts differs from a router's own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import final

from jaxtyping import Bool, Float, Int
from torch import Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class Steering:
    """How one layer's choice of experts, and the weights it gives them, differ from the router's own.

    Tensors without the axis T are for all tokens of a pass. What is given acts in this order; the family's
    own steps (sigmoids, corrections, groups, normalising, scaling) stay where they are in between.

    Attributes:
        logits: added to the router's logits; may require a gradient.
        spread: times the standard deviation of a token's logits over experts, added to them, too.
        highest: experts whose logits are raised above the token's highest.
        mixture: shares of experts, which sum to one; with ``share`` the probabilities of a softmax router
            become (1 - share) times its own and share times these.
        share: see ``mixture``.
        bias: added to the scores that are compared, never to weights.
        allowed: other experts are not chosen.
        forced: entries that are not negative are chosen whatever their score.
        ranks: the first place and the place after the last, in falling order of score, of the experts that
            are kept; the end may be beyond the family's own number. Where the family's weights sum to a
            constant they still do.
        least: of the chosen, those whose share of the token's weights is less are left out; the weights of
            the others stay as they are.
        scale: what weights are multiplied by in the end, by expert.
    """

    logits: Float[Tensor, "*T E"] | None = None
    spread: Float[Tensor, "*T E"] | None = None
    highest: Bool[Tensor, "*T E"] | None = None
    mixture: Float[Tensor, "*T E"] | None = None
    share: Float[Tensor, "*T"] | None = None
    bias: Float[Tensor, "*T E"] | None = None
    allowed: Bool[Tensor, "*T E"] | None = None
    forced: Int[Tensor, "T K"] | None = None
    ranks: Int[Tensor, "*T 2"] | None = None
    least: Float[Tensor, "*T"] | None = None
    scale: Float[Tensor, "*T E"] | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """Names of what differs."""
        return tuple(one.name for one in fields(self) if getattr(self, one.name) is not None)

    @property
    def idle(self) -> bool:
        """Whether all is the router's own."""
        return not self.given

    @property
    def changes_logits(self) -> bool:
        """Whether the router's product is not what it would be."""
        return any(x is not None for x in (self.logits, self.spread, self.highest, self.mixture))

    @property
    def changes_choice(self) -> bool:
        """Whether the choice itself is made otherwise."""
        return any(x is not None for x in (self.bias, self.allowed, self.forced, self.ranks))

    @property
    def changes_weights(self) -> bool:
        """Whether chosen experts are left out or weighted otherwise afterwards."""
        return any(x is not None for x in (self.ranks, self.least, self.scale))
