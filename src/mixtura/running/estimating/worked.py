"""Problems of what is worked out in steps: sums to check, and plans to refine."""

from __future__ import annotations

import numpy as np

from mixtura.running.estimating.lessons import Draw, Lesson, Problem


def _sums(num: int, draw: Draw) -> np.ndarray:
    """Rows a, o, b, a o b, p, c, (a o b) p c: numbers from 1 to 20, operators 1 and -1."""
    a, b, c = draw.integers(1, 21, (3, num))
    first, second = draw.choice([-1, 1], (2, num))
    half = a + first * b
    return np.stack([a, first, b, half, second, c, half + second * c], axis=1).astype(float)


def worked_sums(draw: Draw) -> Lesson:
    """Sums of two steps, 400 right ones and 400 with another sum's results; which of two is off by 1 to 3."""
    right = _sums(400, draw)
    wrong, other = _sums(400, draw), _sums(400, draw)
    wrong[:, [3, 6]] = other[:, [3, 6]]
    tested = _sums(1000, draw)
    # A wrong first result is used in the second step, or is not.
    off = draw.integers(1, 4, 500) * draw.choice([-1, 1], 500)
    where = draw.integers(0, 3, 500)
    tested[:500, 3] += np.where(where < 2, off, 0)
    tested[:500, 6] += np.where(where > 0, off, 0)
    y, new_y = np.repeat([1, 0], 400), np.repeat([0, 1], 500)
    return Lesson(np.concatenate([right, wrong]), y, tested, new_y)


WORKED: tuple[Problem, ...] = (
    Problem("worked sums", worked_sums.__doc__ or "", "area", "classes", {"rise": {}}, worked_sums),
)
