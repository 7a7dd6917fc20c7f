"""Equal shares, whatever the sizes."""

from __future__ import annotations

import torch

from mixtura.methods.data_mixers import Domains, mix
from mixtura.methods.data_mixers.uniform import Uniform


def test_sizes_do_not_count() -> None:
    for sizes in ([1.0, 1.0, 1.0], [9.0, 1.0, 0.0]):
        known = Domains(("a", "b", "c"), torch.tensor(sizes), 10, 5)
        assert mix(Uniform(), known, torch.tensor([3.0, 2.0, 1.0])).tolist() == [1 / 3] * 3
