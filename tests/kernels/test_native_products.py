"""Products by the compiled kernels against float64, on every instruction set this processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import FORMATS, error_by_scale, matrix_of, rows_of
from torch import Tensor

from mixtura.errors import UnknownNameError
from mixtura.kernels import isas, using
from mixtura.kernels.compiled import num_threads, options, processors
from mixtura.kernels.crossing import few_rows, multiply
from mixtura.kernels.matrices import coded_matrix, dense_matrix

# Sums of up to 2,000 products in float32; a bfloat16 result is rounded once, to 8 bits.
FLOAT_ERROR, ROUNDING = 4e-6, 2.0**-8
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def allowed(found: Tensor, x: Tensor, dense: Tensor) -> float:
    """The error that rounding explains, in units of `error_by_scale`."""
    if found.dtype == torch.float32:
        return FLOAT_ERROR
    truth = x.double() @ dense.T
    size = (x.double().square() @ dense.square().T).sqrt()
    return float((truth.abs() / size).max()) * ROUNDING + FLOAT_ERROR


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("bits", list(FORMATS), ids=FORMATS.values())
def test_products(bits: int, dtype: str, isa: str) -> None:
    for cols, group in ((512, 64), (300, 32), (515, 256)):
        matrix, dense = matrix_of(70, cols, bits, group=group)
        for num in (1, 3, 8, 21):
            x = rows_of(num, cols, DTYPES[dtype])
            with using(isa=isa):
                found = multiply(matrix, x)
            assert error_by_scale(found, x, dense) < allowed(found, x, dense)


@SETTINGS
@given(
    bits=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(list(DTYPES)),
    isa=st.sampled_from(isas() or ("",)),
    rows=st.integers(1, 90),
    cols=st.integers(1, 700),
    num=st.integers(1, 70),
    group=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape(
    bits: int, dtype: str, isa: str, rows: int, cols: int, num: int, group: int, seed: int
) -> None:
    matrix, dense = matrix_of(rows, cols, bits, group=group, seed=seed)
    x = rows_of(num, cols, DTYPES[dtype], seed)
    with using(isa=isa):
        found = multiply(matrix, x)
    assert error_by_scale(found, x, dense) < allowed(found, x, dense)


@SETTINGS
@given(
    bits=st.sampled_from([32, 16]),
    isa=st.sampled_from(isas() or ("",)),
    rows=st.integers(1, 200),
    cols=st.integers(1, 300),
    num=st.integers(1, 20),
)
def test_products_with_transposed_matrices(bits: int, isa: str, rows: int, cols: int, num: int) -> None:
    matrix, dense = matrix_of(rows, cols, bits, transposed=True)
    x = rows_of(num, cols, torch.float32)
    with using(isa=isa):
        assert error_by_scale(multiply(matrix, x), x, dense) < FLOAT_ERROR


def test_strides_and_biases() -> None:
    whole = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    weight, bias = whole[3:33, 10:90], whole[0, :30].bfloat16()
    matrix = dense_matrix(weight)
    assert matrix is not None
    x = rows_of(9, 100, torch.float32)[:, 7:87]
    found = multiply(matrix, x, bias)
    assert error_by_scale(found - bias.float(), x, weight.double()) < FLOAT_ERROR
    assert dense_matrix(whole[:, ::2]) is None
    assert dense_matrix(whole.double()) is None
    assert coded_matrix(whole.to(torch.uint8)[:, ::2], whole.bfloat16(), cols=100, bits=8, group=100) is None


@pytest.mark.parametrize("bits", list(FORMATS), ids=FORMATS.values())
def test_an_error_in_one_weight_is_seen(bits: int) -> None:
    matrix, dense = matrix_of(8, 2048, bits)
    x = rows_of(1, 2048, torch.float32)
    dense[3, 1000] *= 1.05
    with pytest.raises(AssertionError):
        assert error_by_scale(multiply(matrix, x), x, dense) < FLOAT_ERROR


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("bits", list(FORMATS), ids=FORMATS.values())
def test_a_row_is_the_same_in_any_batch_on_any_threads(bits: int, dtype: str, isa: str) -> None:
    matrix, _ = matrix_of(133, 900, bits, group=32)
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
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_int8_inputs_err_by_as_much_as_is_said(bits: int, isa: str) -> None:
    matrix, dense = matrix_of(64, 2048, bits)
    x = rows_of(8, 2048, torch.bfloat16)
    with using(int8_inputs=True, isa=isa):
        found = multiply(matrix, x.float()).double()
    truth = x.double() @ dense.T
    assert float((found - truth).norm() / truth.norm()) < 0.01


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", list(FORMATS), ids=FORMATS.values())
def test_what_is_not_finite_stays_so_and_where_it_is(bits: int, value: float, int8: bool) -> None:
    matrix, dense = matrix_of(20, 200, bits)
    for isa in isas():
        for dtype in DTYPES.values():
            x = rows_of(5, 200, dtype)
            x[2, 77] = value
            with using(int8_inputs=int8, isa=isa):
                found = multiply(matrix, x)
            expected = x.double() @ dense.T
            assert torch.isfinite(found[[0, 1, 3, 4]]).all()
            assert not torch.isfinite(found[2]).any()
            if not int8:
                assert torch.equal(found[2].double(), expected[2]) or value != value


def test_weights_that_are_not_finite() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight[2, 5], weight[4, 9] = float("inf"), float("nan")
    matrix = dense_matrix(weight)
    assert matrix is not None
    x = rows_of(2, 64, torch.float32)
    assert torch.equal(torch.isnan(multiply(matrix, x)), torch.isnan(x @ weight.T))
    assert torch.equal(torch.isinf(multiply(matrix, x)), torch.isinf(x @ weight.T))


def test_options() -> None:
    with using("exact", int8_inputs=True) as outer, using("torch"):
        assert options().mode == "torch"
        assert options().int8_inputs
        assert outer.mode == "exact"
    assert options().mode == "fast"
    with pytest.raises(UnknownNameError, match="did you mean 'exact'"), using("exat"):
        pass
    with pytest.raises(UnknownNameError), using(isa="avx1024"):
        pass
    assert 1 <= num_threads() <= processors() <= (os.cpu_count() or 1)


def test_the_crossing_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixtura.kernels import crossing

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    crossing._few_rows.cache_clear()
    found = few_rows(4, torch.bfloat16)
    assert found >= crossing.ALWAYS_FEW
    assert '"4 bits, bfloat16"' in (tmp_path / "mixtura" / "kernels.json").read_text()
    crossing._few_rows.cache_clear()
    monkeypatch.setattr(crossing, "_measure", lambda *_: 1 / 0)
    assert few_rows(4, torch.bfloat16) == found
    crossing._few_rows.cache_clear()


def test_one_disturbed_measurement_does_not_move_the_crossing() -> None:
    from mixtura.kernels import crossing

    sizes = (crossing.ALWAYS_FEW, *crossing._ROWS)
    assert crossing._best_split([0.5, 0.4, -0.2, 0.3, -0.1, -0.4, -0.5]) == sizes[4]
    assert crossing._best_split([0.1] * len(crossing._ROWS)) == sizes[-1]
    assert crossing._best_split([-0.1] * len(crossing._ROWS)) == crossing.ALWAYS_FEW


MISSING = """
import logging, sys
sys.modules["mixtura.kernels._native"] = None
import torch
from mixtura.kernels import isas, quicken, routed_experts
said = []

class Note(logging.Handler):
    def emit(self, record):
        said.append(record)

logging.getLogger("mixtura").addHandler(Note())
x, ids, matrices = torch.ones(2, 4), torch.tensor([0, 1]), torch.ones(2, 4, 4)
for _ in range(3):
    out = routed_experts(x, ids, ids, torch.ones(2), matrices, matrices, activation=torch.relu)
assert out.tolist() == [[16.0] * 4] * 2
assert isas() == () and quicken(torch.nn.Linear(2, 2)) == 0
assert len(said) == 1, said
"""


def test_without_the_extension_all_runs_and_it_is_said_once() -> None:
    subprocess.run([sys.executable, "-c", MISSING], check=True, timeout=120)
