"""Tokens that are alike sent as one, what that loses given back."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._drawing import generator_of
from mixtura.methods._precision import exact, full_precision
from mixtura.methods.exchanges import Exchange, Hop, Packed

METHOD = {
    "paper": 180,
    "title": "LSH-MoE: Communication-efficient MoE Training via Locality-Sensitive Hashing",
    "tags": ["approximate"],
}


@final
class Lsh(Exchange):
    """Send the mean of tokens that are alike, and add to each output by how much its token differed from it.

    Compressed all-to-all: tokens of one expert whose hashes agree make a cluster, found by cross-polytope
    hashing (the axis nearest to the token after a random rotation, ``hashes`` times). Their centroid is sent
    and computed once; a token's output is the centroid's plus the token's difference from it (error
    compensation).

    Shapes:
        A row for each cluster, as many as there are at most.

    Raises:
        SettingError: ``hashes`` or ``width`` is out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.0, 9.0]])
        >>> packed = Lsh().pack(rows, torch.tensor([4, 4, 4]))
        >>> packed.rows.shape, packed.unpack(10 * packed.rows)[:2]
        (torch.Size([2, 2]), tensor([[10.4500,  0.0000],
                [10.5500,  0.0000]]))

    Differences from the paper:
        Gradients go through centroids and differences alike. Tokens are rotated to ``width`` axes rather than
        to as many as they have, so that hashing costs little; the sign of the nearest axis counts, as the
        paper's set of axes says, though a formula there drops it. Six hashes, as there.

    Reference:
        LSH-MoE: Communication-efficient MoE Training via Locality-Sensitive Hashing (paper 180).
    """

    def __init__(self, *, hashes: int = 6, width: int = 16, seed: int = 0) -> None:
        check_range("Lsh", "hashes", hashes, 1, 64)
        check_range("Lsh", "width", width, 2, 4096)
        self.hashes = hashes
        self.width = width
        self.seed = seed

    def hops(self) -> tuple[Hop, ...]:
        return ("all",)

    def pack(self, rows: Float[Tensor, "N D"], seats: Int[Tensor, " N"]) -> Packed:
        keys = torch.cat([seats[:, None], self._axes(rows.detach())], dim=1)
        clusters, member = torch.unique(keys, dim=0, return_inverse=True)
        counts = torch.bincount(member, minlength=len(clusters))
        summed = exact(rows).new_zeros(len(clusters), rows.shape[1]).index_add(0, member, exact(rows))
        centroids = (summed / counts[:, None]).to(rows.dtype)

        def unpack(outputs: Tensor) -> Tensor:
            # A token that is alone in its cluster is the centroid, and loses nothing.
            return outputs[member] + (rows - centroids[member]).to(outputs.dtype)

        return Packed(centroids, clusters[:, 0].contiguous(), unpack)

    @full_precision()
    def _axes(self, rows: Tensor) -> Tensor:
        """By token and hash, the nearest axis, and its sign."""
        drawn = torch.randn(self.hashes, rows.shape[1], self.width, generator=generator_of(self.seed))
        turned = torch.einsum("nd,hdw->nhw", exact(rows), drawn.to(rows.device, exact(rows).dtype))
        nearest = turned.abs().argmax(-1, keepdim=True)
        negative = turned.gather(-1, nearest) < 0
        return (2 * nearest + negative)[..., 0]
