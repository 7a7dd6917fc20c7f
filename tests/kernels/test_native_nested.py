"""Nested codes by the compiled kernels: one copy read at 8, 4 or 2 bits, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import error_by_scale, generator, matrix_of, nested_of, rows_of
from test_native_experts import ERRORS, Shelf, by_hand
from test_native_products import DTYPES, FLOAT_ERROR, allowed

from mixtura.kernels import ExpertMath, ExpertMatrices, NativeLayer, isas, using
from mixtura.kernels.activations import Activation
from mixtura.kernels.crossing import multiply
from mixtura.kernels.few import run_few
from mixtura.kernels.matrices import nested_matrix
from mixtura.methods.quantizers.nested import Nested
from mixtura.methods.quantizers.round_to_nearest import RoundToNearest

WIDTHS = (8, 4, 2)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("bits", WIDTHS)
def test_products(bits: int, dtype: str, isa: str) -> None:
    for cols, group in ((512, 64), (300, 32), (515, 256), (1100, 512), (700, 700), (260, 48)):
        matrix, dense = nested_of(70, cols, bits, group=group)
        for num in (1, 3, 8, 21):
            x = rows_of(num, cols, DTYPES[dtype])
            with using(isa=isa):
                found = multiply(matrix, x)
            assert error_by_scale(found, x, dense) < allowed(found, x, dense)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(list(DTYPES)),
    isa=st.sampled_from(isas() or ("",)),
    rows=st.integers(1, 90),
    cols=st.integers(1, 1200),
    num=st.integers(1, 70),
    group=st.integers(1, 300) | st.sampled_from([16, 32, 64, 128, 256, 512]),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape(
    bits: int, dtype: str, isa: str, rows: int, cols: int, num: int, group: int, seed: int
) -> None:
    matrix, dense = nested_of(rows, cols, bits, group=group, seed=seed)
    x = rows_of(num, cols, DTYPES[dtype], seed)
    with using(isa=isa):
        found = multiply(matrix, x)
    assert error_by_scale(found, x, dense) < allowed(found, x, dense)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_weight_has_its_place(bits: int, isa: str) -> None:
    # One input at a time: the product is that column of the matrix.
    for cols, group in ((520, 64), (37, 5)):
        matrix, dense = nested_of(5, cols, bits, group=group)
        with using(isa=isa):
            assert torch.equal(multiply(matrix, torch.eye(cols)).T.double(), dense)


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_error_in_one_weight_is_seen(bits: int) -> None:
    matrix, dense = nested_of(8, 2048, bits)
    x = rows_of(1, 2048, torch.float32)
    dense[3, 1000] *= 1.05
    with pytest.raises(AssertionError):
        assert error_by_scale(multiply(matrix, x), x, dense) < FLOAT_ERROR


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_is_the_same_in_any_batch_on_any_threads(bits: int, dtype: str, isa: str) -> None:
    matrix, _ = nested_of(133, 900, bits, group=32)
    x = rows_of(67, 900, DTYPES[dtype])
    before = torch.get_num_threads()
    with using("exact", isa=isa):
        whole = multiply(matrix, x)
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for first, last in ((0, 1), (3, 5), (7, 11), (20, 27), (5, 66)):
                    assert torch.equal(multiply(matrix, x[first:last].clone()), whole[first:last])
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", WIDTHS)
def test_int8_inputs_err_by_as_much_as_is_said(bits: int, isa: str) -> None:
    for cols in (2048, 1000):
        matrix, dense = nested_of(64, cols, bits)
        x = rows_of(8, cols, torch.bfloat16)
        with using(int8_inputs=True, isa=isa):
            found = multiply(matrix, x.float()).double()
        truth = x.double() @ dense.T
        assert float((found - truth).norm() / truth.norm()) < 0.01


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", WIDTHS)
def test_what_is_not_finite_stays_so_and_where_it_is(bits: int, value: float, int8: bool) -> None:
    matrix, dense = nested_of(20, 300, bits)
    for isa in isas():
        for dtype in DTYPES.values():
            x = rows_of(5, 300, dtype)
            x[2, 77] = value
            with using(int8_inputs=int8, isa=isa):
                found = multiply(matrix, x)
            expected = x.double() @ dense.T
            assert torch.isfinite(found[[0, 1, 3, 4]]).all()
            assert not torch.isfinite(found[2]).any()
            if not int8:
                assert torch.equal(found[2].double(), expected[2]) or value != value


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.sampled_from([*WIDTHS, 16]), min_size=1, max_size=5),
    dtype=st.sampled_from(list(DTYPES)),
    isa=st.sampled_from(isas() or ("",)),
    num_tokens=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_experts_of_any_width_in_one_layer(
    widths: list[int], dtype: str, isa: str, num_tokens: int, seed: int
) -> None:
    experts, truths = [], []
    for number, bits in enumerate(widths):
        make = matrix_of if bits == 16 else nested_of
        up, up_dense = make(160, 96, bits, group=32, seed=seed + 10 * number)
        down, down_dense = make(96, 80, bits, group=16, seed=seed + 10 * number + 5)
        experts.append(ExpertMatrices(up, down))
        truths.append({"up": up_dense, "down": down_dense})
    layer = NativeLayer.of(experts)
    assert layer is not None
    known = Activation("silu")
    x = torch.randn(num_tokens, 96, generator=generator(seed)).to(DTYPES[dtype])
    ids = torch.randint(-1, len(widths) + 1, (num_tokens, 3), generator=generator(seed))
    weights = torch.rand(num_tokens, 3, generator=generator(seed))
    with using("exact", isa=isa):
        found = run_few(x, ids, weights, Shelf(layer, len(widths)), ExpertMath(known, known=known))
    assert found is not None
    truth = by_hand(truths, x, ids, weights, known)
    assert float((found.double() - truth).norm()) <= ERRORS[dtype] * float(truth.norm())


def test_fewer_bits_read_fewer_bytes() -> None:
    read = {bits: nested_of(16, 2048, bits)[0].num_bytes for bits in WIDTHS}
    scales = 16 * 2048 // 64 * 2
    assert read == {8: 16 * 2048 + scales, 4: 16 * 1024 + scales, 2: 16 * 512 + scales}
    # As much as a matrix that is stored in so few bits and no more.
    assert read[4] == RoundToNearest(bits=4).num_bytes(16, 2048)
    assert read[2] == RoundToNearest(bits=2).num_bytes(16, 2048)


def test_planes_that_do_not_fit_are_refused() -> None:
    upper, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2).bfloat16()
    sizes = {"cols": 128, "group": 64}
    with pytest.raises(ValueError, match="planes"):
        nested_matrix([upper], scales, bits=4, **sizes)
    assert nested_matrix([upper, upper.T.contiguous().T], scales, bits=4, **sizes) is None
    assert nested_matrix([upper.to("meta")], scales, bits=2, **sizes) is None


def test_what_the_encoder_writes_is_what_is_multiplied() -> None:
    weight = torch.randn(40, 330, generator=generator(0))
    quantizer = Nested(group_size=32)
    encoded = quantizer.encode(weight)
    x = rows_of(3, 330, torch.float32)
    for bits, names in quantizer.widths.items():
        *planes, scales = (encoded.tensors[name] for name in names)
        matrix = nested_matrix(planes, scales, cols=330, bits=bits, group=32)
        assert matrix is not None
        error = (multiply(matrix, x) - x @ weight.T).norm() / (x @ weight.T).norm()
        assert error < {8: 0.01, 4: 0.1, 2: 0.4}[bits]
