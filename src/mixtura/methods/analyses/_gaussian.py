"""Gaussian mixtures of two linear experts under a gate, drawn and fitted by maximum likelihood."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

Gate = Literal["temperature", "activation"]
# Slopes and offsets of the gate's logits, its temperature as a logarithm, slopes, offsets and the spread of
# the experts as a logarithm.
TRUTH = (1.5, -0.5, 0.4, math.log(0.25), -1.0, 1.5, 0.5, -0.5, math.log(0.3))
_GATE, _TEMPERATURE, _EXPERTS = slice(0, 3), 3, slice(4, 8)
# How far from the truth fits begin: the gate and its temperature, then the experts.
_BESIDE = (0.6,) * 4 + (0.2,) * 5


def log_likelihood(
    parameters: Float[Tensor, " P"], x: Float[Tensor, " N"], y: Float[Tensor, " N"], gate: Gate
) -> Float[Tensor, ""]:
    """Of all points together.

    Expert 1's gate is the reference: its logit is 0 before the temperature (after the activation, 0.5).
    """
    logits = _logits(parameters, x, gate).log_softmax(-1)
    slopes, offsets = parameters[4:6], parameters[6:8]
    spread = parameters[8].exp()
    errors = (y[:, None] - x[:, None] * slopes - offsets) / spread
    normal = -0.5 * errors.square() - parameters[8] - 0.5 * math.log(2 * math.pi)
    return (logits + normal).logsumexp(-1).sum()


def _logits(parameters: Float[Tensor, " P"], x: Float[Tensor, " N"], gate: Gate) -> Float[Tensor, "N 2"]:
    first = parameters[0] * x + parameters[1] + parameters[2] * x * x
    pair = torch.stack([first, torch.zeros_like(first)], -1)
    if gate == "activation":
        pair = pair.sigmoid()
    made: Tensor = pair / parameters[3].exp()
    return made


def drawn(size: int, gate: Gate, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points of the true mixture."""
    truth = torch.tensor(TRUTH, dtype=torch.float64)
    x = torch.rand(size, generator=generator, dtype=torch.float64) * 6 - 3
    shares = _logits(truth, x, gate).softmax(-1)
    expert = torch.multinomial(shares, 1, generator=generator)[:, 0]
    noise = torch.randn(size, generator=generator, dtype=torch.float64) * truth[8].exp()
    return x, truth[4:6][expert] * x + truth[6:8][expert] + noise


def error_of_fit(size: int, gate: Gate, generator: torch.Generator) -> tuple[float, float]:
    """How far the fitted gate and experts are from the true ones (norms), begun beside the truth."""
    x, y = drawn(size, gate, generator)
    truth = np.array(TRUTH)
    start = truth + _BESIDE * torch.randn(len(truth), generator=generator, dtype=torch.float64).numpy()

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.enable_grad():
            parameters = torch.tensor(values, dtype=torch.float64, requires_grad=True)
            made = -log_likelihood(parameters, x, y, gate) / size
            (slope,) = torch.autograd.grad(made, parameters)
        return float(made.detach()), slope.numpy()

    fitted = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    away = fitted - truth
    gates = np.append(away[_GATE], np.exp(fitted[_TEMPERATURE]) - np.exp(truth[_TEMPERATURE]))
    return float(np.linalg.norm(gates)), float(np.linalg.norm(away[_EXPERTS]))
