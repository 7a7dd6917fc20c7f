"""Products in float32 at least, under autocast too."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.methods._precision import exact_logits, plain_logits


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_products_are_as_without_autocast() -> None:
    x, rows = drawn(5, 16), drawn(3, 16, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ rows.T).dtype == torch.bfloat16
        found = exact_logits(x, rows)
        assert torch.equal(plain_logits(x, rows), found)
    assert torch.equal(found, x @ rows.T)
    assert plain_logits(x.bfloat16(), rows).dtype == torch.float32
    assert plain_logits(x.bfloat16(), rows.bfloat16()).dtype == torch.bfloat16
