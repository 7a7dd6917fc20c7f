"""A neuron's contribution is the mean square of what it alone adds to the output."""

from __future__ import annotations

import torch

from mixtura.methods.trimmers import NeuronsSeen
from mixtura.methods.trimmers.contribution import Contribution
from mixtura.methods.trimmers.heapr import Heapr


def test_the_score_is_what_the_output_loses_without_the_neuron() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, down = torch.randn(40, 7, generator=generator), torch.randn(5, 7, generator=generator)
    wanted = []
    for neuron in range(7):
        without = hidden.clone()
        without[:, neuron] = 0.0
        wanted.append(float((hidden @ down.T - without @ down.T).square().sum(1).mean()))
    scores = Contribution().scores(NeuronsSeen(hidden.square().mean(0), down))
    torch.testing.assert_close(scores, torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_where_every_direction_is_felt_alike_heapr_is_half_of_it() -> None:
    generator = torch.Generator().manual_seed(1)
    squares, down = torch.rand(7, generator=generator), torch.randn(5, 7, generator=generator)
    alike = NeuronsSeen(squares, down, down.square().sum(0))
    torch.testing.assert_close(2 * Heapr().scores(alike), Contribution().scores(alike))
