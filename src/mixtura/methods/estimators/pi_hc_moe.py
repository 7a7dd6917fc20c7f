"""PI-HC-MoE: fields that obey a differential equation, solved block by block of the mesh."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, final

import torch

from mixtura.errors import UserError
from mixtura.methods.estimators import minimise, seeded, spread_of
from mixtura.methods.estimators._physics import FieldSolver

METHOD = {
    "paper": 1,
    "title": "Scaling physics-informed hard constraints with mixture-of-experts",
    "tags": ["evolves"],
}


@final
class PiHcMoe(FieldSolver):
    """Learn to solve a differential equation from states at the start alone, by hard constraints in blocks.

    Physics-informed networks, neural operators, heat and diffusion. A row is a state on a line of evenly
    spaced points, its ends included. A network makes ``num_bases`` fields over time and place of it. The
    mesh is cut into blocks; the expert of each solves for the weights of the fields that obey the equation
    best at points of its block, with the state at the start and the ends of the line (least squares by
    Levenberg and Marquardt). The network is trained by how well the fields put together obey the equation;
    its gradients go through solutions by the implicit function theorem. Targets are not read.

    Shapes:
        ``X [n, d]``, ``d >= 5``; ``predict [n, d]`` is the state at the horizon, ``fields [n, num_times, d]``
        all of it; ``route`` has a token a point of the mesh, times the slower, and an expert a block.

    Raises:
        SettingError: ``blocks`` is not two numbers that the mesh has points for, ``diffusivity`` or
            ``horizon`` is not in [1e-9, 1e9], ``num_bases`` in [1, 256], ``num_times`` in [5, 4096],
            ``samples`` in [1, 1e6], or a size, rate or ``random_state`` out of range.
        UserError: a number is missing, or rows have fewer than five points.

    Example:
        >>> import numpy as np
        >>> places, sizes = np.linspace(0, 1, 16), np.random.default_rng(0).uniform(0.5, 2, (24, 1))
        >>> X = sizes * np.sin(np.pi * places)
        >>> model = PiHcMoe(equation="heat", horizon=200, num_times=9, epochs=40).fit(X)
        >>> after = X * np.exp(-(np.pi**2) * 5e-4 * 200)
        >>> bool(np.abs(model.predict(X) - after).mean() < 0.1), model.route(X[:1]).num_experts
        (True, 4)

    Differences from the paper:
        A line in place of also a plane; heat and diffusion-sorption (its constants). A small Fourier neural
        operator. Every block reads the whole start, as the released code does for diffusion-sorption,
        relative to the row's root mean square; there to each value. Second derivatives are compact
        differences. Squares are means over what each is of, points are drawn anew each batch, and the solver
        takes at most 20 steps. The loss reads derivatives of the field put together, and so its seams; there
        of the bases, by which small meshes drifted apart from block to block. 12 fields, 64 points a block.
        ``hard=False`` adds up the fields unweighted:
        the penalty alone, to compare with.

    Reference:
        Scaling physics-informed hard constraints with mixture-of-experts (paper 1, abstract);
        ASK-Berkeley/physics-NNs-hard-constraints.
    """

    ranges: ClassVar = {
        "num_bases": (1, 256), "num_times": (5, 4096), "samples": (1, 1e6), "diffusivity": (1e-9, 1e9),
        "horizon": (1e-9, 1e9),
    }  # fmt: skip

    def __init__(
        self,
        *,
        equation: Literal["heat", "diffusion_sorption"] = "diffusion_sorption",
        diffusivity: float = 5e-4,
        horizon: float = 500.0,
        num_times: int = 17,
        blocks: list[int] | None = None,
        num_bases: int = 12,
        samples: int = 64,
        hard: bool = True,
        d_hidden: int = 16,
        epochs: int = 60,
        batch_size: int = 16,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.equation = equation
        self.diffusivity = diffusivity
        self.horizon = horizon
        self.num_times = num_times
        self.blocks = blocks
        self.num_bases = num_bases
        self.samples = samples
        self.hard = hard
        self.d_hidden = d_hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> PiHcMoe:
        """Learn from states at the start; what comes of them need not be known."""
        self.check_settings()
        X = self.fresh_rows(X)
        if X.shape[1] < 5:
            raise UserError(f"rows of PiHcMoe are states at 5 points or more of a line, got {X.shape[1]}")
        parts = self.parts(X.shape[1])
        self.mean_, self.scale_ = float(X.mean()), float(spread_of(X.reshape(-1, 1))[0])
        starts = torch.from_numpy(X)
        with seeded(self.random_state):
            self.rebuild()
            self.losses_ = minimise(
                self.module_.parameters(),
                lambda rows, progress: self.wrong(starts[rows], parts),
                len(X),
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
            )
        return self
