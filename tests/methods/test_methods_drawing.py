"""Parameters and noise from seeds and generators."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods import create
from mixtura.methods._drawing import drawn, gumbel_like, orthogonal
from mixtura.methods.data_mixers import Domains, mix
from mixtura.methods.trimmers import NeuronsSeen


def test_seeds_may_be_any_whole_number() -> None:
    assert torch.equal(drawn(1 << 70, 4), drawn(0, 4))
    assert not torch.equal(drawn(-1 << 70, 4), drawn(1, 4))
    for seed in (-1, 7, (1 << 64) - 1):
        expected = torch.randn(4, generator=torch.Generator().manual_seed(seed)) / 2
        assert torch.equal(drawn(seed, 4), expected)


def test_gumbel_noise_has_its_mean_and_is_finite() -> None:
    noise = gumbel_like(torch.zeros(200_000), torch.Generator().manual_seed(0))
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)


def test_rows_at_right_angles() -> None:
    rows = orthogonal(3, 5, seed=1, gain=0.5).detach()
    torch.testing.assert_close(rows @ rows.T, 0.25 * torch.eye(3))
    assert not torch.equal(rows, orthogonal(3, 5, seed=2, gain=0.5))


@pytest.mark.parametrize("seed", [-(1 << 70), -1, 1 << 64, 1 << 70])
def test_any_whole_number_is_a_seed_of_methods_that_draw(seed: int) -> None:
    seen = NeuronsSeen(torch.ones(4), torch.ones(2, 4))
    trimmer = create("trimmers", "random", seed=seed)
    assert trimmer.scores(seen).tolist() == create("trimmers", "random", seed=seed).scores(seen).tolist()
    known = Domains(("a", "b"), torch.ones(2).double(), 200, 50)
    shares = mix(create("data_mixers", "climb", seed=seed), known, torch.ones(2).double())
    assert float(shares.sum()) == pytest.approx(1)
