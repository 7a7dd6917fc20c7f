"""Rows of a table of embeddings, looked up as a model's own module does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mixtura.kernels.compiled import is_plain, is_recorded, is_wrapped, native


def plain_table(embed: Any) -> Tensor | None:
    """The table in which a module looks up rows and does no more."""
    if type(embed) is not nn.Embedding or embed.max_norm is not None:
        return None
    return embed.weight if is_plain(embed.weight) and embed.weight.is_contiguous() else None


def embedded(model: Any, table: Tensor | None, ids: Tensor) -> Any:
    """What ``embed_tokens`` gives, in memory of its own."""
    extension = native()
    assert extension is not None
    # The module and PyTorch's operators take many times as long as the copy.
    if table is not None and _is_index(ids):
        num_rows, width = table.shape
        x = table.new_empty(*ids.shape, width)
        row_bytes = width * table.element_size()
        if extension.look_up(
            table.data_ptr(), row_bytes, num_rows, ids.data_ptr(), ids.numel(), x.data_ptr()
        ):
            return x
    made = model.embed_tokens(ids)
    return made.clone() if isinstance(made, Tensor) else None


def _is_index(ids: Tensor) -> bool:
    return (
        ids.dtype == torch.int64
        and ids.is_cpu
        and ids.is_contiguous()
        and not is_recorded()
        and not is_wrapped(ids)
    )
