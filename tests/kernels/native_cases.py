"""Matrices in every format the compiled kernels read, beside what they stand for in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.kernels.matrices import Matrix, coded_matrix, dense_matrix, nested_matrix
from mixtura.methods.quantizers import Encoded
from mixtura.methods.quantizers.nested import Nested
from mixtura.methods.quantizers.round_to_nearest import RoundToNearest

# Bits of a weight -> name, as tests are called by it.
FORMATS = {32: "float32", 16: "bfloat16", 8: "int8", 4: "int4", 2: "int2"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(rows: int, cols: int, bits: int, group: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes and scales that no encoder need make: every code is as likely, scales of many sizes."""
    codes = torch.randint(0, 256, (rows, -(-cols * bits // 8)), generator=generator(seed), dtype=torch.uint8)
    sizes = torch.rand(rows, -(-cols // group), generator=generator(seed + 1)) * 0.2 + 0.01
    return codes, sizes.bfloat16()


def matrix_of(
    rows: int, cols: int, bits: int, *, group: int = 64, seed: int = 0, transposed: bool = False
) -> tuple[Matrix, Tensor]:
    """A matrix for the kernels and its numbers in float64."""
    if bits > 8:
        weight = torch.randn(rows, cols, generator=generator(seed))
        weight = weight.to(torch.float32 if bits == 32 else torch.bfloat16)
        stored = weight.T.contiguous().T if transposed else weight
        matrix, dense = dense_matrix(stored), weight.double()
    else:
        group = cols if bits == 8 else min(group, cols)
        codes, scales = random_codes(rows, cols, bits, group, seed)
        matrix = coded_matrix(codes, scales, cols=cols, bits=bits, group=group)
        encoded = Encoded({"codes": codes, "scales": scales}, {"rows": rows, "cols": cols})
        dense = RoundToNearest(bits=bits, group_size=group).decode(encoded, torch.float32).double()
    assert matrix is not None
    return matrix, dense


def nested_of(rows: int, cols: int, bits: int, *, group: int = 64, seed: int = 0) -> tuple[Matrix, Tensor]:
    """A matrix of nested codes read at so many bits, every code as likely, and its numbers in float64."""
    group = min(group, cols)
    shapes = {"codes_2": (rows, -(-cols // 4)), "codes_4": (rows, -(-cols // 4))}
    shapes["codes_8"] = (2, *shapes["codes_2"])
    tensors = {}
    for number, name in enumerate(Nested().widths[bits][:-1]):
        random = generator(seed + 7 * number)
        tensors[name] = torch.randint(0, 256, shapes[name], generator=random, dtype=torch.uint8)
    planes = tuple(tensors.values())
    scales = torch.rand(rows, -(-cols // group), generator=generator(seed + 1)) * 0.2 + 0.01
    tensors[f"scales_{bits}"] = scales.bfloat16()
    encoded = Encoded(tensors, {"rows": rows, "cols": cols})
    dense = Nested(group_size=group).decode(encoded, torch.float32).double()
    matrix = nested_matrix(planes, tensors[f"scales_{bits}"], cols=cols, bits=bits, group=group)
    assert matrix is not None
    return matrix, dense


def rows_of(num: int, cols: int, dtype: torch.dtype, seed: int = 5) -> Tensor:
    return torch.randn(num, cols, generator=generator(seed)).to(dtype)


def error_by_scale(found: Tensor, x: Tensor, dense: Tensor) -> float:
    """The largest error, each relative to what its products add up to without their signs.

    A wrong weight, scale or input shows however small the sum itself happens to be.
    """
    truth = x.double() @ dense.T
    size = (x.double().square() @ dense.square().T).sqrt()
    return float(((found.double() - truth).abs() / size.clamp_min(1e-30)).max())
