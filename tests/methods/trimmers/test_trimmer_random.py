"""Neurons by lot: the seed alone decides."""

from __future__ import annotations

import torch

from mixtura.methods.trimmers import NeuronsSeen
from mixtura.methods.trimmers.random import Random


def test_the_seed_alone_decides() -> None:
    one, other = (NeuronsSeen(torch.rand(50), torch.rand(4, 50)) for _ in range(2))
    assert torch.equal(Random(seed=3).scores(one), Random(seed=3).scores(other))
    assert not torch.equal(Random(seed=3).scores(one), Random(seed=4).scores(one))
