"""Whether two values are the same, to the last bit, whatever they are made of."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal: tensors bit for bit, records and containers part by part.

    Random generators are passed over: being drawn from is what they are for.
    """
    if isinstance(left, torch.Generator):
        return isinstance(right, torch.Generator)
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind in "fc")
    if is_dataclass(left):
        return all(same(getattr(left, item.name), getattr(right, item.name)) for item in fields(left))
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, Sequence) and not isinstance(left, str | bytes):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def random_state() -> list[Any]:
    """The state of every global random generator: Python's, NumPy's and PyTorch's."""
    # beartype, where tests have switched it on, draws from Python's to choose the items it checks.
    python_state = None if "beartype" in sys.modules else random.getstate()
    numpy_state = [np.asarray(part).tolist() for part in np.random.get_state(legacy=True)]
    return [python_state, numpy_state, torch.get_rng_state()]
