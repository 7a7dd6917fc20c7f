"""What the router mixture_of_depths promises beyond its kind's contract."""

from __future__ import annotations

import math

import torch

from mixtura.methods.routers.mixture_of_depths import MixtureOfDepths
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(seed))


def test_each_sequence_passes_its_best_tokens_by_a_plain_loop() -> None:
    router = MixtureOfDepths(SHAPE, capacity=0.4, num_choices=2)
    ids, valid = torch.tensor([0, 1, 1] * 10), torch.arange(30) % 5 != 2
    routing = router(RouterInput(x=tokens(), valid=valid, sequence_ids=ids, training=True))
    depth = (tokens() @ router.depth[0]).detach()
    expected = set()
    for sequence in (0, 1):
        mine = [t for t in range(30) if ids[t] == sequence and valid[t]]
        mine.sort(key=lambda t: -float(depth[t]))
        expected |= set(mine[: math.ceil(0.4 * len(mine))])
    assert set(routing.token_ids.tolist()) == expected
    assert torch.bincount(routing.token_ids).unique().tolist() == [0, 2]
    weights = routing.scores * depth[:, None]
    torch.testing.assert_close(routing.weights, weights[routing.token_ids, routing.expert_ids])


def test_a_decoder_at_inference_judges_each_token_alone() -> None:
    for rule in ("predictor", "score"):
        router = MixtureOfDepths(SHAPE, rule=rule)
        whole = set(router(RouterInput.of(tokens())).token_ids.tolist())
        alone = {t for t in range(30) if router(RouterInput.of(tokens()[t : t + 1])).token_ids.numel()}
        assert whole == alone
        assert 0 < len(whole) < 30
    positive = (tokens() @ router.depth[0] > 0).nonzero().squeeze(-1)
    assert whole == set(positive.tolist())
    encoder = MixtureOfDepths(SHAPE, capacity=0.2)(RouterInput.of(tokens(), causal=False))
    assert encoder.token_ids.unique().numel() == 6


def test_the_predictor_learns_which_tokens_are_taken() -> None:
    router = MixtureOfDepths(SHAPE, capacity=0.25, coefficient=1.0)
    x = tokens(400)
    inputs = RouterInput.of(x, training=True)
    taken = set(router(inputs).token_ids.tolist())
    optimizer = torch.optim.Adam([router.hidden, router.predicted], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        router(inputs).losses["depth"].backward()
        optimizer.step()
    guessed = set(router(RouterInput.of(x)).token_ids.tolist())
    assert len(taken ^ guessed) < 0.1 * 400


def test_the_predictor_does_not_steer_the_tokens() -> None:
    x = tokens().requires_grad_()
    loss = MixtureOfDepths(SHAPE)(RouterInput.of(x, training=True)).losses["depth"]
    assert torch.autograd.grad(loss, x, allow_unused=True)[0] is None
    loss = MixtureOfDepths(SHAPE, rule="score")(RouterInput.of(x, training=True)).losses["depth"]
    assert torch.autograd.grad(loss, x)[0].abs().sum() > 0


def test_loss_by_hand() -> None:
    router = MixtureOfDepths(SHAPE, rule="score", capacity=0.5, coefficient=2.0)
    routing = router(RouterInput.of(tokens(4), training=True))
    depth = (tokens(4) @ router.depth[0]).tolist()
    taken = set(routing.token_ids.tolist())
    each = [math.log(1 + math.exp(-d if t in taken else d)) for t, d in enumerate(depth)]
    torch.testing.assert_close(routing.losses["depth"], torch.tensor(2.0 * sum(each) / 4))
