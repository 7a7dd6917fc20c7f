"""Hard constraints in blocks: least squares by the textbook, implicit gradients, one block is the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._physics import (
    EQUATIONS,
    RIDGE,
    Blocks,
    Law,
    blocks_of,
    differences,
    least_squares,
    points_of,
    retardation,
    solution,
)
from mixtura.methods.estimators.pi_hc_moe import PiHcMoe

PLACES = np.linspace(0, 1, 12)
X = np.random.default_rng(0).uniform(0.3, 1, (10, 1)) * (0.5 + np.sin(np.pi * PLACES))
SMALL = {"num_times": 7, "num_bases": 4, "d_hidden": 6, "epochs": 3, "batch_size": 5}


def bases(num: int, *, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    made = torch.randn(2, 5, 6, num, dtype=torch.float64)
    return torch.stack([made, *differences(made)])


def problem(name: str, terms: torch.Tensor, parts: list[int]) -> tuple[Law, torch.Tensor, tuple]:
    torch.manual_seed(1)
    blocks = blocks_of(5, 6, parts)
    return Law(EQUATIONS[name], 5e-4, 300.0), blocks, points_of(blocks, parts[0] * parts[1], 30)


START = torch.linspace(0.2, 1.5, 12, dtype=torch.float64).reshape(2, 6)


def test_differences_are_exact_on_squares() -> None:
    time, place = torch.meshgrid(
        torch.linspace(0, 1, 5, dtype=torch.float64),
        torch.linspace(0, 1, 6, dtype=torch.float64),
        indexing="ij",
    )
    field = (time**2 + 3 * place**2 + time * place)[None, ..., None]
    by_time, by_place, bent = differences(field)
    assert torch.allclose(by_time[0, ..., 0], 2 * time + place)
    assert torch.allclose(by_place[0, ..., 0], 6 * place + time)
    assert torch.allclose(bent, torch.full_like(bent, 6.0))


def test_a_linear_equation_is_ridge_regression() -> None:
    terms = bases(3)
    law, _, (points, real) = problem("heat", terms, [1, 2])
    assert real.all()
    found = least_squares(Blocks(law, terms, START, points, real), torch.zeros(2, 2, 3).double(), 50, 1e-9)
    for row in range(2):
        for block in range(2):
            lines, goals = [], []
            for point in points[block].tolist():
                t, x = divmod(point, 6)
                lines.append((terms[1] - 0.15 * terms[3])[row, t, x] / len(points[block]) ** 0.5)
                goals.append(0.0)
            size = float(START[row].square().mean().sqrt())
            for x in range(6):
                lines.append(terms[0][row, 0, x] / size / 6**0.5)
                goals.append(float(START[row, x]) / size / 6**0.5)
            for t in range(1, 5):
                for x in (0, 5):
                    lines.append(terms[0][row, t, x] / 8**0.5)
                    goals.append(float(START[row, x]) / 8**0.5)
            matrix, goal = torch.stack(lines).numpy(), np.array(goals)
            normal = matrix.T @ matrix + RIDGE**2 * np.eye(3)
            assert np.allclose(found[row, block].numpy(), np.linalg.solve(normal, matrix.T @ goal), atol=1e-7)


def test_gradients_are_those_of_finite_differences() -> None:
    terms = 1 + 0.2 * bases(3)
    law, _, drawn = problem("diffusion_sorption", terms, [1, 2])
    begin = torch.full((2, 2, 3), 0.3, dtype=torch.float64)

    def solved(field: torch.Tensor) -> torch.Tensor:
        every = torch.stack([field, *differences(field)])
        return solution(Blocks(law, every, START, *drawn), begin, 200, 1e-11)

    field = terms[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(solved(field).square().sum(), field)
    for place in ((0, 0, 2, 1), (0, 2, 3, 0), (1, 4, 5, 2)):
        step = torch.zeros_like(field)
        step[place] = 1e-5
        with torch.no_grad():
            ends = [float(solved(field + sign * step).square().sum()) for sign in (1, -1)]
        assert float(slope[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=2e-3, abs=1e-5)


def test_points_are_of_their_block_and_none_comes_twice() -> None:
    blocks = blocks_of(5, 7, [2, 3])
    assert blocks.unique().tolist() == list(range(6))
    assert blocks[0].tolist() == [0, 0, 0, 1, 1, 2, 2]
    points, real = points_of(blocks, 6, 8)
    for block in range(6):
        own = points[block][real[block]]
        assert (blocks.flatten()[own] == block).all()
        assert len(own.unique()) == min(8, int((blocks == block).sum()))


def test_one_block_is_the_whole_and_blocks_have_no_say_elsewhere() -> None:
    model = PiHcMoe(blocks=[1, 1], samples=1000, **SMALL).fit(X)
    whole = model.fields(X)
    # The same network with every block's points: what one block says of its own points is put together.
    model.set_params(blocks=[1, 3])
    cut = model.fields(X)
    assert not np.allclose(cut, whole)
    start = torch.from_numpy(X)
    with torch.no_grad():
        made = model.module_((start - model.mean_) / model.scale_) * model.scale_
        terms = torch.stack([made, *differences(made)])
        blocks = blocks_of(7, 12, [1, 3])
        law = Law(EQUATIONS["diffusion_sorption"], 5e-4, 500.0)
        for block in range(3):
            points = (blocks.flatten() == block).nonzero()[:, 0][None]
            residual = Blocks(law, terms, start, points, torch.ones_like(points, dtype=torch.bool))
            w = least_squares(residual, torch.ones(10, 1, 4).double(), 20, 1e-4)
            own = (made * w[:, :, None]).sum(-1).numpy()
            assert np.allclose(cut[:, blocks == block], own[:, blocks == block], atol=1e-6)


def test_blocks_are_the_routing() -> None:
    routing = PiHcMoe(blocks=[2, 3], **SMALL).fit(X).route(X[:2])
    assert (routing.num_tokens, routing.num_experts) == (2 * 7 * 12, 6)
    assert routing.load.tolist() == [2 * 4 * 4] * 3 + [2 * 3 * 4] * 3


def test_learning_lowers_what_the_equation_leaves() -> None:
    model = PiHcMoe(**{**SMALL, "epochs": 12}).fit(X)
    assert model.losses_[-1] < 0.7 * model.losses_[0]


def test_retardation_is_the_formula() -> None:
    u = 0.4
    wanted = 1 + 0.71 / 0.29 * 2880 * 3.5e-4 * 0.874 * (u + 1e-6) ** -0.126
    assert float(retardation(torch.tensor(u, dtype=torch.float64))) == pytest.approx(wanted)


def test_rows_of_zeros_are_solved() -> None:
    said = PiHcMoe(equation="heat", **SMALL).fit(np.zeros((6, 12))).predict(np.zeros((2, 12)))
    assert np.abs(said).max() < 1e-6


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="5 points or more of a line, got 4"):
        PiHcMoe().fit(X[:, :4])
    for blocks in ([1], [0, 2], [1, 13], [8, 1]):
        with pytest.raises(SettingError, match="blocks of PiHcMoe must be two numbers"):
            PiHcMoe(blocks=blocks, **SMALL).fit(X)
    with pytest.raises(SettingError, match="horizon of PiHcMoe"):
        PiHcMoe(horizon=0.0).fit(X)
    with pytest.raises(SettingError, match="equation"):
        PiHcMoe().set_params(equation="wave").fit(X)
