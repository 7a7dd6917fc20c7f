"""The law of what experts save, fitted to trained models."""

from __future__ import annotations

import numpy as np

from mixtura.methods.analyses import Lines, Table

COLUMNS = ("flops", "loss", "activation", "granularity")


def fit_law(
    moe: np.ndarray, leverage: np.ndarray, unit: float, floor: float
) -> tuple[np.ndarray, float, np.ndarray]:
    """The law's four numbers, the sum of squares they leave, and the leverage they predict."""
    active = np.log(moe[:, 2] + floor * (1 - moe[:, 2]))
    x = np.log(moe[:, 3])
    design = active[:, None] * np.stack([np.ones_like(x), np.log(moe[:, 0] / unit), x, x * x], 1)
    law = np.linalg.lstsq(design, np.log(leverage), rcond=None)[0]
    made = design @ law
    return law, float(((np.log(leverage) - made) ** 2).sum()), np.exp(made)


def listed(moe: np.ndarray, leverage: np.ndarray, predicted: np.ndarray) -> Table:
    """The runs with what they save, and what the law says."""
    rows = tuple(
        (*map(float, row), float(a), float(b)) for row, a, b in zip(moe, leverage, predicted, strict=True)
    )
    return Table(title="Leverage by run", columns=(*COLUMNS, "leverage", "law"), rows=rows)


def drawn(moe: np.ndarray, leverage: np.ndarray) -> Lines:
    """Leverage over the share of parameters in use."""
    points = tuple((float(a), float(b)) for a, b in zip(moe[:, 2], leverage, strict=True))
    return Lines(
        title="Leverage by the share of parameters in use",
        x_label="activation",
        y_label="leverage",
        series={"runs": points},
        joined=False,
        log_x=True,
        log_y=True,
    )
