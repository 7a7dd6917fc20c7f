"""The projections of one of several attentions in a layer."""

from __future__ import annotations

from typing import final

from torch import Generator, nn

from mixtura.methods._norms import RMSNorm
from mixtura.methods.attentions._shared import projection


@final
class Projections(nn.Module):
    """Some of an attention's projections: queries and output, keys and values, or all four."""

    def __init__(self, sizes: tuple[int, int, int], norms: tuple[int, int] | None, eps: float) -> None:
        super().__init__()
        self.sizes, self.norms, self.eps = sizes, norms, eps

    def draw(self, generator: Generator, *, queries: bool, keys: bool, bias: bool) -> None:
        """Make the projections that are here."""
        d_model, num_queries, num_keys = self.sizes
        if queries:
            self.q_proj = projection(generator, d_model, num_queries, bias=bias)
        if keys:
            self.k_proj = projection(generator, d_model, num_keys, bias=bias)
            self.v_proj = projection(generator, d_model, num_keys, bias=bias)
        if queries:
            self.o_proj = projection(generator, num_queries, d_model, bias=bias)
        self.q_norm = RMSNorm(self.norms[0], self.eps) if queries and self.norms else None
        self.k_norm = RMSNorm(self.norms[1], self.eps) if keys and self.norms else None
