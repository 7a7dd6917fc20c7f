"""Fields that obey an equation: bases that a network makes, blocks of a mesh, and least squares in each."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mixtura.errors import SettingError
from mixtura.methods.estimators._base import Regressor
from mixtura.methods.estimators._learning import with_gradients
from mixtura.methods.estimators._networks import one_each
from mixtura.methods.estimators._training import seeded
from mixtura.types import Routing

# A block's weights enter its least squares with this factor.
RIDGE: Final = 1e-4
_DAMPING: Final = 1e-3
# Most steps of the solver, and the least one that is worth another.
_STEPS, _TOL = 20, 1e-4


# What is zero inside, of a field, its slopes by time, by place, twice by place, and a rate of diffusion.
Inside = Callable[[Tensor, float], Tensor]
# What is zero at the two ends of the line, of values there, slopes, values at the start, and a diffusivity.
Edges = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _heat(terms: Float[Tensor, "4 *P"], rate: float) -> Float[Tensor, "*P"]:
    return terms[1] - rate * terms[3]


def _held(ends: Tensor, slopes: Tensor, start: Tensor, diffusivity: float) -> Tensor:
    return ends - start


def retardation(u: Any) -> Any:
    """How much slower diffusion is where the ground takes in what diffuses, by Freundlich's isotherm.

    Of a tensor or an array.
    """
    porosity, density, k, n = 0.29, 2880.0, 3.5e-4, 0.874
    return 1 + (1 - porosity) / porosity * density * k * n * (u.clip(0) + 1e-6) ** (n - 1)


def _sorption(terms: Float[Tensor, "4 *P"], rate: float) -> Float[Tensor, "*P"]:
    left: Tensor = terms[1] - rate / retardation(terms[0]) * terms[3]
    return left


def _fed(ends: Tensor, slopes: Tensor, start: Tensor, diffusivity: float) -> Tensor:
    return torch.stack([ends[..., 0] - 1, ends[..., 1] - diffusivity * slopes[..., 1]], dim=-1)


EQUATIONS: Final[Mapping[str, tuple[Inside, Edges]]] = {
    "heat": (_heat, _held),
    "diffusion_sorption": (_sorption, _fed),
}


@final
@dataclass(frozen=True, slots=True)
class Law:
    """An equation with its numbers, on a mesh that is 1 long both ways: what fields must obey."""

    equation: tuple[Inside, Edges]
    diffusivity: float
    horizon: float

    def inside(self, terms: Float[Tensor, "4 *P"]) -> Float[Tensor, "*P"]:
        """What is zero of a field and its derivatives."""
        return self.equation[0](terms, self.diffusivity * self.horizon)

    def left(self, field: Float[Tensor, "n T P"], start: Float[Tensor, "n P"]) -> Float[Tensor, ""]:
        """How far fields are from it, by their own derivatives, which show seams that bases do not."""
        terms = torch.stack([field[..., None], *differences(field[..., None])])[..., 0]
        return self.squares(terms, start).mean()

    def squares(self, terms: Float[Tensor, "4 n T P"], start: Float[Tensor, "n P"]) -> Float[Tensor, " n"]:
        """How far whole fields are from the equation, the start and the ends: three mean squares added."""
        ends = self.equation[1](
            terms[0][:, 1:, [0, -1]], terms[2][:, 1:, [0, -1]], start[:, None, [0, -1]], self.diffusivity
        )
        begun = (terms[0][:, 0] - start) / _size(start)
        parts = self.inside(terms).flatten(1), begun, ends.flatten(1)
        return torch.stack([one.square().mean(1) for one in parts]).sum(0)


def _size(start: Float[Tensor, "n P"]) -> Float[Tensor, "n 1"]:
    """The root mean square of each row, or 1 where it is next to nothing."""
    size = start.square().mean(1, keepdim=True).sqrt()
    return torch.where(size > 1e-12, size, 1.0)


def differences(field: Float[Tensor, "n T P N"]) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of fields on a mesh of length 1 both ways: by time, by place, and twice by place."""
    steps, places = 1 / (field.shape[1] - 1), 1 / (field.shape[2] - 1)
    (by_time,) = torch.gradient(field, spacing=steps, dim=1, edge_order=2)
    (by_place,) = torch.gradient(field, spacing=places, dim=2, edge_order=2)
    inner = (field[:, :, 2:] - 2 * field[:, :, 1:-1] + field[:, :, :-2]) / places**2
    # At the ends the line through the two next points goes on.
    left, right = 2 * inner[:, :, :1] - inner[:, :, 1:2], 2 * inner[:, :, -1:] - inner[:, :, -2:-1]
    return by_time, by_place, torch.cat([left, inner, right], dim=2)


def blocks_of(num_times: int, num_places: int, parts: list[int]) -> Int[Tensor, "T P"]:
    """Which block each point of a mesh lies in: ``parts`` along time and along the line, evenly."""
    cuts = [
        np.repeat(np.arange(num), [len(one) for one in np.array_split(np.arange(size), num)])
        for size, num in zip((num_times, num_places), parts, strict=True)
    ]
    return torch.from_numpy(cuts[0][:, None] * parts[1] + cuts[1][None])


def check_parts(parts: list[int], num_times: int, num_places: int) -> None:
    """Raise `SettingError` unless a mesh can be cut into so many parts along time and along the line."""
    sizes = num_times, num_places
    if len(parts) != 2 or not all(1 <= part <= size for part, size in zip(parts, sizes, strict=True)):
        raise SettingError(
            f"blocks of PiHcMoe must be two numbers, at most {num_times} along time and {num_places} along "
            f"the line, got {parts!r}"
        )


def points_of(
    blocks: Int[Tensor, "T P"], num: int, samples: int
) -> tuple[Int[Tensor, "E S"], Bool[Tensor, "E S"]]:
    """Points drawn from every block without repeating any, and which are real where a block has fewer."""
    flat = blocks.flatten()
    keys = torch.where(flat == torch.arange(num)[:, None], torch.rand(num, len(flat)), -1.0)
    found = keys.topk(min(samples, len(flat)), dim=1)
    real = found.values >= 0
    return found.indices[:, real.any(0)], real[:, real.any(0)]


@final
class Blocks:
    """Least squares of every row's blocks: what is to vanish by the weights ``[n, E, N]`` of bases in each.

    Of a block: the equation at points drawn of it, the start and the ends of the line as every block has
    them, and the weights themselves, by a little.
    """

    def __init__(
        self,
        law: Law,
        terms: Float[Tensor, "4 n T P N"],
        start: Float[Tensor, "n P"],
        points: Int[Tensor, "E S"],
        real: Bool[Tensor, "E S"],
    ) -> None:
        self.law, self.size = law, _size(start)[:, None] * start.shape[1] ** 0.5
        self.inside = terms.flatten(2, 3)[:, :, points]
        self.share = real.to(start) / real.sum(1, keepdim=True).sqrt()
        self.begun, self.goal = terms[0][:, 0], start[:, None]
        # Values and slopes at the ends of the line, after the start.
        self.ends = terms[[0, 2]][:, :, 1:, [0, -1]]
        self.held = start[:, None, None, [0, -1]]

    def residual(self, w: Float[Tensor, "n E N"]) -> Float[Tensor, "n E R"]:
        """All that is to vanish."""
        law, edge = self._pointwise((self.inside @ w[..., None])[..., 0], self._at_ends(w))
        return torch.cat([law, (w @ self.begun.mT - self.goal) / self.size, edge, RIDGE * w], dim=2)

    def jacobian(self, w: Float[Tensor, "n E N"]) -> Float[Tensor, "n E R N"]:
        """How all that changes with the weights."""
        fields, ends = (self.inside @ w[..., None])[..., 0], self._at_ends(w)
        with torch.enable_grad():
            made = self._pointwise(fields.requires_grad_(), ends.requires_grad_())
            # Each number depends on the fields at its own point alone, so a sum has the slopes of all.
            slopes = torch.autograd.grad([one.sum() for one in made], [fields, ends])
        law = (slopes[0][..., None] * self.inside).sum(0)
        edge = (slopes[1][..., None] * self.ends[:, :, None]).sum(0).flatten(2, 3)
        begun = (self.begun / self.size.mT)[:, None].expand(-1, w.shape[1], -1, -1)
        ridge = RIDGE * torch.eye(w.shape[2]).to(w).expand(*w.shape, -1)
        return torch.cat([law, begun, edge, ridge], dim=2)

    def _at_ends(self, w: Float[Tensor, "n E N"]) -> Float[Tensor, "2 n E T 2"]:
        made: Tensor = (w @ self.ends.flatten(2, 3).mT).unflatten(3, self.ends.shape[2:4])
        return made

    def _pointwise(self, fields: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        edge = self.law.equation[1](ends[0], ends[1], self.held, self.law.diffusivity).flatten(2)
        return self.law.inside(fields) * self.share, edge / edge.shape[2] ** 0.5


@torch.no_grad()
def least_squares(blocks: Blocks, start: Float[Tensor, "n E N"], most: int, tol: float) -> Tensor:
    """The weights of each problem with the least sum of squares, by Levenberg and Marquardt's method.

    Each problem goes on until a step is below ``tol`` of its weights or ``most`` steps were tried.
    """
    w, damping = start, torch.full(start.shape[:2], _DAMPING).to(start)
    r = blocks.residual(w)
    active = torch.ones(start.shape[:2], dtype=torch.bool)
    for _ in range(most):
        slopes = blocks.jacobian(w)
        square = slopes.mT @ slopes
        square = square + torch.diag_embed(damping[..., None] * square.diagonal(dim1=-2, dim2=-1))
        step = torch.linalg.solve(square, -(slopes.mT @ r[..., None]))[..., 0]
        tried = blocks.residual(w + step)
        better = (tried.square().sum(-1) <= r.square().sum(-1)) & active
        w = torch.where(better[..., None], w + step, w)
        r = torch.where(better[..., None], tried, r)
        active = active & (step.norm(dim=-1) > tol * (tol + w.norm(dim=-1)))
        damping = torch.where(better, damping / 10, damping * 10).clamp(1e-12, 1e12)
        if not active.any():
            break
    return w


def solution(blocks: Blocks, start: Float[Tensor, "n E N"], most: int, tol: float) -> Tensor:
    """The least-squares weights, with gradients of the implicit function theorem and none through the solver.

    Where the gradient g of the squares vanishes, dw = -H^-1 dg: one Newton step whose H is held, from
    weights that are held, has the value of the solution and that derivative.
    """
    w = least_squares(blocks, start, most, tol)
    if not torch.is_grad_enabled():
        return w
    w.requires_grad_()
    squares = 0.5 * blocks.residual(w).square().sum()
    (g,) = torch.autograd.grad(squares, w, create_graph=True)
    ways = torch.eye(w.shape[2]).to(w)[:, None, None].expand(-1, *w.shape)
    (bends,) = torch.autograd.grad(g, w, ways, retain_graph=True, is_grads_batched=True)
    made: Tensor = w.detach() - torch.linalg.solve(bends.movedim(0, -2), g[..., None])[..., 0]
    return made


def put_together(
    law: Law,
    bases: Float[Tensor, "n T P N"],
    start: Float[Tensor, "n P"],
    parts: list[int],
    samples: int | None,
) -> Float[Tensor, "n T P"]:
    """The field of bases weighed in every block by its own solution; all by one without ``samples``."""
    blocks, num = blocks_of(bases.shape[1], bases.shape[2], parts), parts[0] * parts[1]
    w = start.new_ones(len(start), num, bases.shape[3])
    if samples is not None:
        terms = torch.stack([bases, *differences(bases)])
        w = solution(Blocks(law, terms, start, *points_of(blocks, num, samples)), w, _STEPS, _TOL)
    return (bases * w[:, blocks]).sum(-1)


@final
class FourierBases(nn.Module):
    """A Fourier neural operator: from a state at the start to basis fields over time and place."""

    def __init__(self, num_bases: int, width: int, num_times: int, num_places: int, layers: int = 2) -> None:
        super().__init__()
        self.modes = min(6, num_times // 2), min(8, num_places // 2 + 1)
        self.lift = nn.Linear(3, width)
        scale = 1 / width
        self.spectra = nn.ParameterList(
            nn.Parameter(scale * torch.randn(2 * self.modes[0], self.modes[1], width, width, 2))
            for _ in range(layers)
        )
        self.plain = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.project = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, num_bases))
        time, place = torch.linspace(0, 1, num_times), torch.linspace(0, 1, num_places)
        self.mesh: Tensor
        self.register_buffer("mesh", torch.stack(torch.meshgrid(time, place, indexing="ij"), dim=-1))

    def forward(self, start: Float[Tensor, "n P"]) -> Float[Tensor, "n T P N"]:
        """The basis fields of every row."""
        held = start[:, None, :, None].expand(-1, self.mesh.shape[0], -1, -1)
        h = self.lift(torch.cat([held, self.mesh.expand(len(start), -1, -1, -1)], dim=-1))
        for spectrum, plain in zip(self.spectra, self.plain, strict=True):
            h = nn.functional.gelu(self._filtered(h, torch.view_as_complex(spectrum)) + plain(h))
        made: Tensor = self.project(h)
        return made

    def _filtered(self, h: Float[Tensor, "n T P W"], spectrum: Tensor) -> Float[Tensor, "n T P W"]:
        low, across = self.modes
        waves = torch.fft.rfft2(h, dim=(1, 2))
        kept = torch.zeros_like(waves)
        for rows, part in ((slice(0, low), spectrum[:low]), (slice(-low, None), spectrum[low:])):
            kept[:, rows, :across] = torch.einsum("ntpi,tpio->ntpo", waves[:, rows, :across], part)
        made: Tensor = torch.fft.irfft2(kept, s=h.shape[1:3], dim=(1, 2))
        return made


class FieldSolver(Regressor, ABC):
    """An estimator of fields over time and place, from states at the start."""

    def fields(self, X: Any) -> np.ndarray:
        """The field of every row over time and place, its start included."""
        X = self.rows(X)
        with with_gradients(), torch.no_grad(), seeded(self.random_state):
            made: np.ndarray = self._solved(torch.from_numpy(X), self.parts(X.shape[1])).numpy()
        return made

    def predict(self, X: Any) -> np.ndarray:
        """The states at the horizon."""
        return self.fields(X)[:, -1]

    def route(self, X: Any) -> Routing:
        """Which block's expert has which point of every row's mesh."""
        X = self.rows(X)
        parts = self.parts(X.shape[1])
        ids = blocks_of(self.num_times, X.shape[1], parts).flatten().repeat(len(X))
        return one_each(ids, nn.functional.one_hot(ids, parts[0] * parts[1]).double())

    @property
    def law(self) -> Law:
        """The equation with its numbers."""
        return Law(EQUATIONS[self.equation], self.diffusivity, self.horizon)

    def rebuild(self) -> None:
        sizes = self.num_bases, self.d_hidden, self.num_times, self.n_features_in_
        self.module_ = FourierBases(*sizes).double()

    def parts(self, num_places: int) -> list[int]:
        """How many blocks the mesh has along time and along the line."""
        parts = [1, min(4, num_places)] if self.blocks is None else self.blocks
        check_parts(parts, self.num_times, num_places)
        return parts

    def _solved(self, start: Float[Tensor, "n P"], parts: list[int]) -> Float[Tensor, "n T P"]:
        bases = self.module_((start - self.mean_) / self.scale_) * self.scale_
        return put_together(self.law, bases, start, parts, self.samples if self.hard else None)

    def wrong(self, start: Float[Tensor, "n P"], parts: list[int]) -> Float[Tensor, ""]:
        """How far the fields of these states are from the equation."""
        return self.law.left(self._solved(start, parts), start)
