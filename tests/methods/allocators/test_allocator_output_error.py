"""The allocator output_error is the errors themselves."""

from __future__ import annotations

import numpy as np

from mixtura.methods.allocators import ExpertsSeen
from mixtura.methods.allocators.output_error import OutputError


def test_losses_are_errors_and_not_the_same_array() -> None:
    errors = np.array([[0.0, 1.0, 7.0], [0.0, 2.0, 3.0]])
    ones = np.ones(2, dtype=np.int64)
    seen = ExpertsSeen(ones * 0, ones, ones * 0.5, np.array([16.0, 4.0, 2.0]), errors)
    found = OutputError().losses(seen)
    assert (found == errors).all()
    found += 1
    assert errors[0, 0] == 0
