"""llama.cpp's own quantizers, and the package gguf's where they are not installed."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mixtura.checkpoints.gguf.package import gguf_package
from mixtura.checkpoints.gguf.types import NEED_IMPORTANCE, StorageType
from mixtura.errors import UserError

_LIBRARY = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}.get(sys.platform, "libggml-base.so")

# Types that the package gguf writes, without importance.
_BY_PACKAGE = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


@final
class _Traits(ctypes.Structure):
    """What the library says of a type, as far as it is read here."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


@final
class LlamaLibrary:
    """llama.cpp's own quantizers, from the library that its Python binding brings."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.ggml_type_name.restype = ctypes.c_char_p
        library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_chunk.argtypes = (
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p
        )  # fmt: skip
        self._library = library

    def encode(
        self, weight: Float[Tensor, "R C"], kind: StorageType, importance: Float[Tensor, " C"] | None
    ) -> UInt8[Tensor, " B"]:
        """A matrix in a type, errors weighed by importance where it is given."""
        rows, cols = weight.shape
        source = weight.float().contiguous()
        weighed = None if importance is None else importance.float().contiguous()
        self._library.ggml_quantize_init(kind.number)
        codes = torch.empty(kind.num_bytes(weight.shape), dtype=torch.uint8)
        written = self._library.ggml_quantize_chunk(
            kind.number,
            source.data_ptr(),
            codes.data_ptr(),
            0,
            rows,
            cols,
            None if weighed is None else weighed.data_ptr(),
        )
        assert written == codes.numel(), f"{kind.name}: {written} bytes instead of {codes.numel()}"
        return codes

    def decode(
        self, codes: UInt8[Tensor, " B"], kind: StorageType, rows: int, cols: int
    ) -> Float[Tensor, "R C"]:
        """What `encode` made, as numbers."""
        traits = self._library.ggml_get_type_traits(kind.number).contents
        self._library.ggml_quantize_init(kind.number)
        values = torch.empty(rows, cols)
        traits.to_float(codes.data_ptr(), values.data_ptr(), values.numel())
        return values


@cache
def llama_library() -> LlamaLibrary | None:
    """The library of the installed binding; None where there is none."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "lib" / _LIBRARY
    return LlamaLibrary(path) if path.is_file() else None


def check_writable(kind: StorageType) -> None:
    """Refuse a type that nothing installed can write.

    Raises:
        UserError: it needs llama.cpp's library.
    """
    if kind.is_plain or llama_library() is not None:
        return
    if kind.name not in _BY_PACKAGE:
        raise UserError(
            f"the type {kind.name} is written by llama.cpp's own library, which is not installed; "
            f"give: pip install 'mixtura[llama]' (it compiles for some minutes), or choose one of "
            f"{', '.join(_BY_PACKAGE)}"
        )


def encode(
    weight: Float[Tensor, "R C"], kind: StorageType, importance: Float[Tensor, " C"] | None = None
) -> UInt8[Tensor, " B"]:
    """A matrix as the bytes of a type, by llama.cpp's library where it is installed."""
    if kind.is_plain:
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind.name]
        return weight.to(dtype).contiguous().view(torch.uint8).reshape(-1)
    library = llama_library()
    if library is not None:
        if importance is None and kind.name in NEED_IMPORTANCE:
            # No token reached the matrix: its inputs count alike.
            importance = torch.ones(weight.shape[1])
        return library.encode(weight, kind, importance)
    package = gguf_package()
    codes = package.quants.quantize(weight.float().numpy(), package.GGMLQuantizationType(kind.number))
    return torch.from_numpy(np.ascontiguousarray(codes)).reshape(-1)
