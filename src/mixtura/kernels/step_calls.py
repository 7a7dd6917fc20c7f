"""The compiled calls of a decoder layer for few tokens, on tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.kernels.compiled import NUMBERS, native, way_for
from mixtura.kernels.step_cache import Grown, grow, growing_layer
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
    turns, mask = turns_of(around.tables), mask_of(around.mask)
    layer = (
        None
        if cache is None
        else growing_layer(cache, around.layer_index, x, shape.num_kv_heads, shape.width)
    )
    if layer is not None:
        extension.run_attention(one, record, grown_place(turns, grow(layer, num), mask))
        return out
    keys, values = (x.new_empty(num_sequences, shape.num_kv_heads, num, shape.width) for _ in range(2))
    if cache is None:
        extension.run_attention(one, record, _place(turns, keys, values, mask, 0))
        return out
    queries = torch.empty(num_sequences * num, shape.num_heads * shape.width)
    extension.run_projections(one, record, _place(turns, keys, values, mask, 0), queries.data_ptr())
    keys, values = (_readable(tensor, x.dtype) for tensor in cache.update(keys, values, around.layer_index))
    # A cache may give back more than the tokens so far: room for those to come, which only a mask shuts out.
    # Without one, PyTorch's attention lets several tokens see the first keys as if they were all there are.
    past = 0 if around.mask is None and num > 1 else keys.shape[2] - num
    extension.run_attending(one, record, _place(turns, keys, values, mask, past), queries.data_ptr())
    return out


def num_keys(cache: Any, layer_index: int, num: int) -> int:
    """Keys that ``num`` new tokens get to see of a cache, or could but for a mask."""
    if cache is None:
        return num
    length, _ = cache.get_mask_sizes(num, layer_index)
    return int(length)


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


def _readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Turns(NamedTuple):
    """`Tables` as the extension's records of rows; ``by_sequence`` is 0 where all sequences share them."""

    cosines: Any
    sines: Any
    width: int
    by_sequence: int


def turns_of(tables: Tables, first: int = 0) -> Turns:
    """The tables from one of their tokens on, as the extension reads them."""
    extension = native()
    assert extension is not None
    cosines, sines = tables
    by_token = cosines.stride(1)
    ahead, number = first * by_token * cosines.element_size(), NUMBERS[cosines.dtype]
    return Turns(
        extension.Rows(cosines.data_ptr() + ahead, number, by_token),
        extension.Rows(sines.data_ptr() + ahead, number, by_token),
        cosines.shape[2],
        cosines.stride(0) // by_token if cosines.shape[0] > 1 else 0,
    )


def grown_place(turns: Turns, grown: Grown, mask: Any) -> Any:
    """The extension's record of where tokens stand that a cache was given room for."""
    extension = native()
    assert extension is not None
    strides = grown.strides[:3]
    keys, values = extension.Cached(grown.keys, *strides), extension.Cached(grown.values, *strides)
    return extension.Place(*turns, keys, values, grown.past, mask)


def _place(turns: Turns, keys: Tensor, values: Tensor, mask: Any, past: int) -> Any:
    """The same of tokens whose own keys and values come behind ``past`` of these."""
    extension = native()
    assert extension is not None
    cached = (extension.Cached(part.data_ptr(), *part.stride()[:3]) for part in (keys, values))
    return extension.Place(*turns, *cached, past, mask)


def mask_of(mask: Tensor | None) -> Any:
    """The extension's record of a mask; an empty one of none."""
    extension = native()
    assert extension is not None
    if mask is None:
        return extension.Mask()
    is_bytes = mask.dtype == torch.bool
    by_sequence = mask.stride(0) if mask.shape[0] > 1 else 0
    number = 0 if is_bytes else NUMBERS[mask.dtype]
    return extension.Mask(mask.data_ptr(), is_bytes, number, by_sequence, mask.stride(2), mask.stride(3))
