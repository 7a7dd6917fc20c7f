"""The compiled calls of a decoder layer for few tokens, on tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.kernels.compiled import NUMBERS, native, rows_of, way_for
from mixtura.kernels.step_cache import grow, growing_layer
from mixtura.kernels.step_parts import AttentionShape


class Tables(NamedTuple):
    """Cosines and sines of the tokens' places."""

    cosines: Float[Tensor, "S Q width"]
    sines: Float[Tensor, "S Q width"]


class Around(NamedTuple):
    """What a layer is given beside its tokens."""

    tables: Tables
    mask: Tensor | None
    cache: Any
    layer_index: int


def run_attention(x: Float[Tensor, "S Q D"], record: Any, shape: AttentionShape, around: Around) -> Tensor:
    """``x + attention(norm(x))``; keys and values go into the cache."""
    extension = native()
    assert extension is not None
    out = torch.empty_like(x)
    one = _pass(x, out)
    num_sequences, num, _ = x.shape
    cache = around.cache
    layer = (
        None
        if cache is None
        else growing_layer(cache, around.layer_index, x, shape.num_kv_heads, shape.width)
    )
    if layer is not None:
        keys, values = grow(layer, num)
        extension.run_attention(one, record, place_of(around, keys, values, num))
        return out
    keys, values = (x.new_empty(num_sequences, shape.num_kv_heads, num, shape.width) for _ in range(2))
    if cache is None:
        extension.run_attention(one, record, place_of(around, keys, values, num))
        return out
    queries = torch.empty(num_sequences * num, shape.num_heads * shape.width)
    extension.run_projections(one, record, place_of(around, keys, values, num), queries.data_ptr())
    keys, values = (_by_number(tensor) for tensor in cache.update(keys, values, around.layer_index))
    extension.run_attending(one, record, place_of(around, keys, values, num), queries.data_ptr())
    return out


def run_mixture(x: Float[Tensor, "S Q D"], record: Any) -> Float[Tensor, "S Q D"]:
    """``x + experts(norm(x))``."""
    extension = native()
    assert extension is not None
    out = torch.empty_like(x)
    extension.run_mixture(_pass(x, out), record)
    return out


def _pass(x: Tensor, out: Tensor) -> Any:
    extension = native()
    assert extension is not None
    return extension.Pass(way_for(x.dtype), NUMBERS[x.dtype], *x.shape, x.data_ptr(), out.data_ptr())


def _by_number(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def place_of(around: Around, keys: Tensor, values: Tensor, num: int) -> Any:
    """The extension's record of where ``num`` tokens stand; theirs are the last of the keys and values."""
    extension = native()
    assert extension is not None
    cosines, sines = around.tables
    by_sequence = cosines.stride(0) // cosines.stride(1) if cosines.shape[0] > 1 else 0
    return extension.Place(
        rows_of(cosines[0]),
        rows_of(sines[0]),
        cosines.shape[2],
        by_sequence,
        extension.Cached(keys.data_ptr(), *keys.stride()[:3]),
        extension.Cached(values.data_ptr(), *values.stride()[:3]),
        keys.shape[2] - num,
        _mask(around.mask),
    )


def _mask(mask: Tensor | None) -> Any:
    extension = native()
    assert extension is not None
    if mask is None:
        return extension.Mask()
    is_bytes = mask.dtype == torch.bool
    by_sequence = mask.stride(0) if mask.shape[0] > 1 else 0
    number = 0 if is_bytes else NUMBERS[mask.dtype]
    return extension.Mask(mask.data_ptr(), is_bytes, number, by_sequence, mask.stride(2), mask.stride(3))
