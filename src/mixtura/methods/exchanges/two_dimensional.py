"""To the place in the node first, to the node next."""

from __future__ import annotations

from typing import final

from mixtura.methods.exchanges import Exchange, Hop

METHOD = {"paper": 79, "title": "Tutel: Adaptive Mixture-of-Experts at Scale"}


@final
class TwoDimensional(Exchange):
    """Gather, inside a node, what goes to the same place of other nodes; then cross between nodes once.

    The two-dimensional hierarchical all-to-all (2DH): devices of a node first hand each other what is for
    devices of their own place anywhere, so that a device then sends each other node one large message.

    Shapes:
        A row for each assignment.

    Example:
        >>> TwoDimensional().hops()
        ('within', 'between')

    Differences from the paper:
        Chunks have the sizes that routing gives them; the authors' are equal, because their experts have a
        capacity. Their strided copies are a sort here. It is also the hierarchical all-to-all of
        DeepSpeed-MoE (paper 38).

    Reference:
        Tutel: Adaptive Mixture-of-Experts at Scale (paper 79).
    """

    def hops(self) -> tuple[Hop, ...]:
        return ("within", "between")
