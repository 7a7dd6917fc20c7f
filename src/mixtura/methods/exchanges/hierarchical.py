"""To the node first, to the device there next."""

from __future__ import annotations

from typing import final

from mixtura.methods.exchanges import Exchange, Hop

METHOD = {
    "paper": 108,
    "title": "SMILE: Scaling Mixture-of-Experts with Efficient Bi-level Routing",
}


@final
class Hierarchical(Exchange):
    """Send tokens to their expert's node first, and inside it to their expert's device next.

    Two all-to-alls in place of one: between the devices of one place in all nodes, then between those of a
    node. A device sends a message to each other node and each neighbour instead of to every device: of G
    nodes and P devices (G - 1) + (P / G - 1) in place of P - 1. What crosses between nodes is the same.

    Shapes:
        A row for each assignment.

    Example:
        >>> Hierarchical().hops()
        ('between', 'within')

    Differences from the paper:
        There a router of two levels chooses node and expert, one each a token, and its choices are exchanged
        in these two steps; here the steps serve any router's choices. Read in abstract and descriptions by
        others.

    Reference:
        SMILE: Scaling Mixture-of-Experts with Efficient Bi-level Routing (paper 108).
    """

    def hops(self) -> tuple[Hop, ...]:
        return ("between", "within")
