"""What an expert's rounding does to its layer's output, and nothing else."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from numpy import ndarray

from mixtura.methods.allocators import Allocator, ExpertsSeen

METHOD = {"paper": None, "title": "The squared error of the layer's output, the baseline of all allocators"}


@final
class OutputError(Allocator):
    """Bits by the measured error of the layer's output alone, over all layers. What any rule must beat.

    A fit tries this mixture in any case, as "mixed widths, blocks alike": it is the same plan.

    Shapes:
        ``errors [M, O]`` to losses ``[M, O]``, the same.

    Example:
        >>> import numpy as np
        >>> one = np.ones(2, dtype=np.int64)
        >>> seen = ExpertsSeen(one * 0, one, one * 0.5, np.array([16.0, 2.0]), np.array([[0, 3.0], [0, 1.0]]))
        >>> OutputError().losses(seen).tolist()
        [[0.0, 3.0], [0.0, 1.0]]
    """

    def losses(self, seen: ExpertsSeen) -> Float[ndarray, "M O"]:
        return seen.errors.copy()
