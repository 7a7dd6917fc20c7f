"""What the quantizer gptq promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods import create
from mixtura.methods.quantizers.gptq import Gptq
from mixtura.methods.quantizers.round_to_nearest import RoundToNearest


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def correlated_moments(cols: int, rank: int) -> Tensor:
    inputs = normal(300, rank, seed=1) @ normal(rank, cols, seed=2) + 0.1 * normal(300, cols, seed=3)
    return inputs.T @ inputs


def lost(weight: Tensor, back: Tensor, moments: Tensor) -> float:
    off = back - weight
    return float(((off @ moments) * off).sum())


def by_removing_columns(weight: Tensor, moments: Tensor, scales: Tensor, group: int, half: float) -> Tensor:
    """The recursion as optimal brain surgery states it: the inverse shrinks by a column each time."""
    damped = moments / moments.diagonal().mean()
    damped = damped + 0.01 * torch.eye(len(moments))
    order = torch.argsort(moments.diagonal(), descending=True, stable=True).tolist()
    inverse, left = torch.linalg.inv(damped.double()), list(range(len(order)))
    now, chosen = weight.double().clone(), torch.zeros_like(weight)
    for column in order:
        at = left.index(column)
        scale = scales[:, column // group].double()
        level = ((now[:, column] / scale + half).round().clamp(0, 2 * half)) - half
        chosen[:, column] = level.float()
        error = (now[:, column] - level * scale) / inverse[at, at]
        for place, other in enumerate(left):
            now[:, other] -= error * inverse[at, place]
        inverse = inverse - inverse[:, at, None] * inverse[None, at] / inverse[at, at]
        keep = [place for place in range(len(left)) if place != at]
        inverse, left = inverse[keep][:, keep], [left[place] for place in keep]
    return chosen


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_levels_are_those_of_removing_columns_one_by_one(bits: int) -> None:
    weight, moments = normal(5, 150), correlated_moments(150, 40)
    quantizer = Gptq(bits=bits, group_size=32)
    encoded = quantizer.encode(weight, moments)
    # The scales that columns were rounded by, before they were fitted.
    scales = quantizer._levels.scales(weight, moments.diagonal()).to(torch.bfloat16).float()
    group, half = quantizer._levels.group(150), quantizer._levels.half
    wanted = by_removing_columns(weight, moments, scales, group, half)
    ones = torch.ones_like(encoded.tensors["scales"])
    encoded.tensors["scales"] = ones
    chosen = quantizer.decode(encoded)
    assert float((chosen != wanted).float().mean()) < 0.01


@pytest.mark.parametrize("bits", [4, 2])
def test_outputs_lose_less_than_by_rounding_to_nearest(bits: int) -> None:
    weight, moments = normal(32, 128), correlated_moments(128, 30)
    ours, plain = Gptq(bits=bits), RoundToNearest(bits=bits)
    rounded = plain.decode(plain.encode(weight))
    made = ours.decode(ours.encode(weight, moments))
    assert lost(weight, made, moments) < 0.4 * lost(weight, rounded, moments)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_what_is_stored_is_read_by_round_to_nearest(bits: int) -> None:
    encoded = Gptq(bits=bits).encode(normal(9, 130), correlated_moments(130, 20))
    assert torch.equal(Gptq(bits=bits).decode(encoded), RoundToNearest(bits=bits).decode(encoded))
    assert encoded.num_bytes == RoundToNearest(bits=bits).num_bytes(9, 130)


def test_inputs_that_are_never_there_do_not_stop_it() -> None:
    moments = correlated_moments(64, 10)
    moments[:, 7] = moments[7] = 0.0
    for given in (moments, torch.zeros(64, 64)):
        back = Gptq(bits=4).decode(Gptq(bits=4).encode(normal(4, 64), given))
        assert torch.isfinite(back).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_refused(bad: float) -> None:
    moments = torch.eye(64)
    moments[3, 3] = bad
    with pytest.raises(UserError, match="holds NaN or infinity; give text"):
        Gptq(bits=4).encode(torch.ones(64, 64), moments)


@pytest.mark.parametrize("name", ["gptq", "integers", "trellis"])
def test_an_input_that_dwarfs_the_others_is_felt_least(name: str) -> None:
    """As in models with massive activations: what such an input loses is made up for nearly all.

    The scales of least loss for the levels that were chosen, in float64 and with nothing drawn towards what
    they were, lose hardly less; with products in bfloat16 the loss was many times that.
    """
    weight, inputs = normal(64, 128), normal(400, 128, seed=1)
    inputs[0] *= 300
    moments = inputs.T @ inputs
    quantizer = create("quantizers", name, bits=4, group_size=64)
    back = quantizer.decode(quantizer.encode(weight, moments))
    blind = quantizer.decode(quantizer.encode(weight))
    off, of_blind = ((one - weight).double() for one in (back, blind))
    wide = moments.double()
    lost, lost_blind = (float(((one @ wide) * one).sum()) for one in (off, of_blind))
    best = 0.0
    for row, own in zip(weight.double(), back.double(), strict=True):
        parts = torch.stack([torch.cat([own[:64], own[64:] * 0]), torch.cat([own[:64] * 0, own[64:]])])
        factors = torch.linalg.solve(parts @ wide @ parts.T, parts @ wide @ row)
        left = factors @ parts - row
        best += float(left @ wide @ left)
    assert lost < 0.05 * lost_blind
    assert lost < 1.5 * best
