"""What the router mixer_gate promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers._clusters import k_means
from mixtura.methods.routers.mixer_gate import MixerGate
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=8, num_experts=3)
# Three families of six environments; families lie far apart.
FAMILY = torch.arange(18) % 3
BEST = torch.tensor([2, 0, 1])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def contexts() -> torch.Tensor:
    return 5 * torch.eye(3, 8)[FAMILY] + 0.2 * torch.randn(18, 8, generator=seeded(0))


def losses() -> torch.Tensor:
    """Expert ``BEST[f]`` does best on family f, but for one environment in each."""
    made = torch.rand(18, 3, generator=seeded(1)) + 1
    made[torch.arange(18), BEST[FAMILY]] -= 1
    made[:3] = 100 * made[:3].roll(1, dims=1)
    return made


def refitted(router: MixerGate) -> int:
    """Refit until clustering succeeds; the seed with which it did."""
    return next(seed for seed in range(50) if router.refit(contexts(), losses(), seeded(seed)))


def test_after_a_refit_every_family_goes_to_the_expert_that_does_best_on_it() -> None:
    router = MixerGate(SHAPE)
    refitted(router)
    routing = router(RouterInput.of(contexts()))
    chosen = torch.empty(18, dtype=torch.long).scatter(0, routing.token_ids, routing.expert_ids)
    # Which expert is best is the median's word: the odd environments do not mislead it.
    assert torch.equal(chosen, BEST[FAMILY])
    assert routing.weights.tolist() == [1.0] * 18


def test_the_gate_is_the_least_squares_map_to_the_clusters_experts() -> None:
    router = MixerGate(SHAPE, noise=0.0)
    refitted(router)
    inputs = torch.cat([contexts(), torch.ones(18, 1)], dim=1)
    wanted = torch.eye(3)[BEST[FAMILY]]
    expected = torch.linalg.lstsq(inputs, wanted).solution
    torch.testing.assert_close(router.weight, expected[:-1].T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(router.bias, expected[-1], atol=1e-4, rtol=1e-4)


def test_every_expert_gets_one_cluster_even_if_one_expert_is_best_everywhere() -> None:
    router = MixerGate(SHAPE)
    everywhere = torch.tensor([[0.1, 1.0, 2.0]]).expand(18, -1)
    next(seed for seed in range(50) if router.refit(contexts(), everywhere, seeded(seed)))
    assert router(RouterInput.of(contexts())).load.tolist() == [6, 6, 6]


def test_a_gate_without_gradient_is_left_alone_when_clustering_fails() -> None:
    router = MixerGate(SHAPE)
    before = router.weight.clone()
    same = torch.zeros(18, 8)
    # All contexts are alike: all but one cluster stay empty.
    assert not router.refit(same, losses(), seeded(0))
    assert torch.equal(router.weight, before)
    assert not any(parameter.requires_grad for parameter in router.parameters())


def test_fewer_contexts_than_experts_are_refused() -> None:
    with pytest.raises(UserError, match="needs 3 contexts, got 2"):
        MixerGate(SHAPE).refit(contexts()[:2], losses()[:2], seeded(0))


def test_k_means_by_hand() -> None:
    values = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    found = [k_means(values, 2, seeded(seed), num_iterations=20, tolerance=1e-3) for seed in range(5)]
    for clusters in found:
        assert clusters is not None
        assert clusters[0] == clusters[1] != clusters[2] == clusters[3]
    assert k_means(values, 2, seeded(0), num_iterations=1, tolerance=0.0) is None


def test_k_means_goes_by_absolute_distance() -> None:
    # From the last vector it is 2.9 to the first, and 1.7 in both dimensions to the second: 3.4, or 2.4
    # by the straight line.
    values = torch.tensor([[0.0, 0.0], [1.7, 4.6], [0.0, 2.9]])
    seed = next(
        seed for seed in range(50) if set(torch.randperm(3, generator=seeded(seed))[:2].tolist()) == {0, 1}
    )
    clusters = k_means(values, 2, seeded(seed), num_iterations=1, tolerance=1e6)
    assert clusters is not None
    assert clusters[2] == clusters[0] != clusters[1]


def test_a_loss_is_needed_for_every_pair_of_context_and_expert() -> None:
    contexts = torch.randn(6, SHAPE.d_model, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"losses of shape \(6, 3\)"):
        MixerGate(SHAPE).refit(contexts, torch.zeros(6, 2), torch.Generator())
