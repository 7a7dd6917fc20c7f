"""What the quantizer low_rank_sparse promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError, UserError
from mixtura.methods.quantizers.low_rank_sparse import LowRankSparse


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def moments_of(cols: int) -> Tensor:
    inputs = normal(500, cols, seed=8) * torch.linspace(0.1, 3, cols)
    return inputs.T @ inputs


def best_product(weight: Tensor, moments: Tensor, rank: int) -> Tensor:
    """By whitening the inputs and a singular value decomposition, in float64."""
    root = torch.linalg.cholesky(moments.double())
    u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    return torch.linalg.solve_triangular(root, (u[:, :rank] * s[:rank]) @ v[:rank], upper=False, left=False)


@pytest.mark.parametrize("calibrated", [False, True])
def test_rows_that_lose_most_are_kept_and_the_rest_is_the_best_product(calibrated: bool) -> None:
    weight = normal(24, 40)
    moments = moments_of(40) if calibrated else None
    known = torch.eye(40) if moments is None else moments
    quantizer = LowRankSparse(bits=6.4)
    encoded = quantizer.encode(weight, moments)
    rank, places = encoded.tensors["right"].shape[0], encoded.tensors["places"].tolist()
    assert rank == int(0.15 * 24 * 40 / 64)
    left = weight.double() - best_product(weight, known, rank)
    lost = [float(row @ known.double() @ row) for row in left]
    assert places == sorted(sorted(range(24), key=lambda row: -lost[row])[: len(places)])
    others = weight.clone()
    others[places] = 0
    wanted = best_product(others, known, rank).float()
    wanted[places] = weight[places]
    back = quantizer.decode(encoded)
    # Numbers of bfloat16 have eight bits.
    torch.testing.assert_close(back, wanted, rtol=0.02, atol=0.02)
    torch.testing.assert_close(back[places], weight[places], rtol=0.01, atol=0.01)


def test_what_is_of_that_form_is_found() -> None:
    weight = normal(40, 3) @ normal(3, 60, seed=1)
    weight[[4, 17, 30]] = 3 * normal(3, 60, seed=2)
    quantizer = LowRankSparse(bits=4)
    encoded = quantizer.encode(weight)
    assert {4, 17, 30} <= set(encoded.tensors["places"].tolist())
    assert encoded.tensors["right"].shape[0] >= 2
    back = quantizer.decode(encoded)
    assert float((back - weight).norm() / weight.norm()) < (
        0.02 if len(encoded.tensors["right"]) > 2 else 0.6
    )


def test_the_papers_sizes() -> None:
    """Factors of 15 % of the numbers and a quarter of the rows."""
    encoded = LowRankSparse().encode(normal(256, 512))
    assert encoded.tensors["right"].shape[0] == int(0.15 * 256 * 512 / 768)
    assert encoded.tensors["rows"].shape[0] == pytest.approx(64, abs=2)
    assert LowRankSparse().bits_per_weight(256, 512) == pytest.approx(6.4, abs=0.1)


@pytest.mark.parametrize("bits", [0.5, 2, 6.4, 16])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_more_bits_than_asked_for(bits: float, share: float) -> None:
    quantizer = LowRankSparse(bits=bits, rank_share=share)
    for rows, cols in ((1, 1), (3, 50), (64, 32)):
        assert quantizer.bits_per_weight(rows, cols) <= bits
        back = quantizer.decode(quantizer.encode(normal(rows, cols)))
        assert back.shape == (rows, cols)


def test_settings_and_moments_that_are_none() -> None:
    with pytest.raises(SettingError, match="rank_share"):
        LowRankSparse(rank_share=1.5)
    with pytest.raises(SettingError, match="bits"):
        LowRankSparse(bits=float("nan"))
    moments = torch.eye(8)
    moments[2, 2] = torch.nan
    with pytest.raises(UserError, match="calibration text holds NaN"):
        LowRankSparse().encode(normal(8, 8), moments)
