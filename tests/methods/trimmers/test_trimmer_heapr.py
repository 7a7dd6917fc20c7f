"""HEAPr's score is half of E[h^2] w' E[g g'] w, as a plain loop states it."""

from __future__ import annotations

import torch

from mixtura.methods.trimmers import NeuronsSeen
from mixtura.methods.trimmers.heapr import Heapr


def test_scores_are_the_quadratic_form_of_the_gradients_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, gradients = (torch.randn(50, size, generator=generator) for size in (7, 5))
    down = torch.randn(5, 7, generator=generator)
    moments = gradients.T @ gradients / 50
    wanted = []
    for neuron in range(7):
        column = down[:, neuron]
        wanted.append(0.5 * float(hidden[:, neuron].square().mean()) * float(column @ moments @ column))
    seen = NeuronsSeen(hidden.square().mean(0), down, (gradients @ down).square().mean(0))
    torch.testing.assert_close(Heapr().scores(seen), torch.tensor(wanted))
