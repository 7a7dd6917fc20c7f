"""The compiled kernels on codes of trellises, beside PyTorch's operators."""

from __future__ import annotations

import pytest
import torch

from mixtura.kernels import Matrix, isas, trellis_matrix, using
from mixtura.kernels.coding import decode_compiled, search_compiled
from mixtura.kernels.compiled import native
from mixtura.kernels.crossing import multiply
from mixtura.methods._codebooks import codebook
from mixtura.methods._trellis import Columns, Stored, decode_plainly, search_plainly

pytestmark = pytest.mark.skipif(native() is None, reason="mixtura is installed without its compiled kernels")

RATES = (8, 12, 16, 20, 24, 28, 32, 40, 48)
SHAPES = ((64, 128, 128), (100, 70, 32), (256, 129, 64), (1, 1, 1), (130, 35, 5))


def stored(rate: int, rows: int, cols: int, group: int) -> Stored:
    generator = torch.Generator().manual_seed(rate)
    strips, groups = -(-rows // 64), -(-cols // group)
    codes = torch.randint(0, 256, (strips, cols, rate), generator=generator, dtype=torch.uint8)
    scales = torch.rand(strips, groups, 64, generator=generator).to(torch.bfloat16)
    return Stored(codes, scales, rows, group, codebook(rate)[0])


def matrix_of(one: Stored) -> Matrix:
    made = trellis_matrix(one.codes, one.scales, rows=one.rows, cols=one.codes.shape[1], group=one.group)
    assert made is not None
    return made


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_decoded_matrix(isa: str, rate: int, dtype: torch.dtype) -> None:
    for rows, cols, group in SHAPES:
        one = stored(rate, rows, cols, group)
        weight = decode_plainly(one, torch.float32)
        for num in (1, 3, 5):
            x = torch.randn(num, cols, generator=torch.Generator().manual_seed(num)).to(dtype)
            expected = x.float() @ weight.T
            with using("exact", isa=isa):
                made = multiply(matrix_of(one), x)
            # Sums in float32, rounded once to the inputs' dtype.
            most = float((x.float().abs() @ weight.abs().T).max())
            bound = (
                1e-6 * most if dtype == torch.float32 else 1e-6 * most + 2**-8 * float(expected.abs().max())
            )
            assert float((made.float() - expected).abs().max()) <= bound


@pytest.mark.parametrize("isa", isas())
def test_a_row_of_inputs_does_not_depend_on_those_beside_it(isa: str) -> None:
    one = stored(24, 200, 300, 128)
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        with using("exact", isa=isa):
            together = multiply(matrix_of(one), x.to(dtype))
            alone = torch.cat([multiply(matrix_of(one), row[None].to(dtype)) for row in x])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("rate", RATES)
def test_decoding_is_the_same_to_the_last_bit(isa: str, rate: int) -> None:
    for rows, cols, group in SHAPES:
        one = stored(rate, rows, cols, group)
        for dtype in (torch.float32, torch.bfloat16):
            with using(isa=isa):
                assert torch.equal(decode_compiled(one, dtype), decode_plainly(one, dtype))


def columns(rate: int, num: int, rows: int) -> Columns:
    generator = torch.Generator().manual_seed(rate)
    weights = torch.randn(num, rows, generator=generator)
    scales = 0.02 * torch.rand(num, rows, generator=generator)
    factor = torch.eye(num) + torch.triu(0.1 * torch.randn(num, num, generator=generator), 1)
    return Columns(weights, weights.clone(), scales, factor, rate, codebook(rate)[0])


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("rate", RATES)
def test_the_search_finds_paths_as_good(isa: str, rate: int) -> None:
    # Instruction sets may round sums in other places, so that of two paths as good the other is taken.
    plain, compiled = columns(rate, 3, 17 * 64), columns(rate, 3, 17 * 64)
    wanted = search_plainly(plain)
    with using(isa=isa):
        made = search_compiled(compiled)
    squares = [float(found.left[0].square().sum()) for found in (made, wanted)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-4)
    same = (made.codes == wanted.codes).all(-1).float().mean()
    assert same > 0.95
    # What is left is what the codes do not stand for.
    ones = torch.ones(17, 3, 64, dtype=torch.bfloat16)
    codes = made.codes.transpose(0, 1).contiguous()
    levels = decode_plainly(Stored(codes, ones, 17 * 64, 1, compiled.table), torch.float32)
    torch.testing.assert_close(compiled.originals - levels.T * compiled.scales, made.left)
    # Each column was rounded with what the ones before handed on.
    handed_on = compiled.originals + torch.triu(compiled.factor, 1).T @ made.left
    torch.testing.assert_close(compiled.weights, handed_on)


def test_with_pytorch_alone_nothing_changes() -> None:
    plain, by_mode = columns(16, 2, 64), columns(16, 2, 64)
    wanted = search_plainly(plain)
    with using("torch"):
        made = search_compiled(by_mode)
        one = stored(16, 64, 8, 8)
        assert torch.equal(decode_compiled(one, torch.float32), decode_plainly(one, torch.float32))
    assert torch.equal(wanted.codes, made.codes)


def test_what_the_kernels_cannot_read_is_left_to_pytorch() -> None:
    one = stored(24, 64, 8, 8)
    apart = torch.cat([one.codes, one.codes], dim=-1)[..., :24]
    assert trellis_matrix(apart, one.scales, rows=64, cols=8, group=8) is None
    assert trellis_matrix(one.codes[..., :6].contiguous(), one.scales, rows=64, cols=8, group=8) is None
    assert trellis_matrix(one.codes, one.scales.float(), rows=64, cols=8, group=8) is None
