"""Finding groups of alike vectors, for routers that are fitted by them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def k_means(
    values: Float[Tensor, "C D"],
    num_clusters: int,
    generator: torch.Generator,
    *,
    num_iterations: int,
    tolerance: float,
) -> Int[Tensor, " C"] | None:
    """Each vector's cluster, or None where a cluster stays empty or centres do not settle.

    Centres start at vectors drawn at random and move to the means of the vectors nearest to them by
    absolute distance, until none moves by ``tolerance`` in any dimension.
    """
    start = torch.randperm(values.shape[0], generator=generator, device=generator.device)
    centres = values[start[:num_clusters].to(values.device)]
    for _ in range(num_iterations):
        nearest = torch.cdist(values, centres, p=1).argmin(1)
        counts = torch.bincount(nearest, minlength=num_clusters)
        if (counts == 0).any():
            return None
        moved = torch.zeros_like(centres).index_add(0, nearest, values) / counts[:, None]
        if (moved - centres).abs().max() < tolerance:
            return nearest
        centres = moved
    return None
