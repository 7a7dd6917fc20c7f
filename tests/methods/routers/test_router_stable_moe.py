"""What the router stable_moe promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import torch

from mixtura.methods.routers.stable_moe import StableMoe
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)
WORDS = torch.arange(60) % 12


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(60, SHAPE.d_model, generator=torch.Generator().manual_seed(seed))


def given(x: torch.Tensor, **fields: Any) -> RouterInput:
    return RouterInput.of(x, token_ids=WORDS, **fields)


def test_stage_one_takes_the_nearest_centroid_and_weighs_by_its_sigmoid() -> None:
    router = StableMoe(SHAPE, stage_one_steps=5)
    routing = router(given(tokens(), training=True, step=4))
    products = tokens() @ router.weight.T
    assert torch.equal(routing.expert_ids, products.argmax(-1)[routing.token_ids])
    expected = products.sigmoid()[routing.token_ids, routing.expert_ids]
    torch.testing.assert_close(routing.weights, expected)


def test_losses_of_stage_one_by_hand() -> None:
    router = StableMoe(SHAPE, balance_coefficient=2.0, distil_coefficient=3.0)
    routing = router(given(tokens(), training=True))
    products = tokens() @ router.weight.T
    chosen = products.argmax(-1)
    counts = chosen.bincount(minlength=4)
    balance = sum((counts[e] - 15) / 15 * products[chosen == e, e].sigmoid().sum() for e in range(4)) / 60
    torch.testing.assert_close(routing.losses["balance"], 2 * balance)
    light = (router.words[WORDS] @ router.light_weight.T).log_softmax(-1)
    torch.testing.assert_close(routing.losses["distil"], -3 * light[torch.arange(60), chosen].mean())


def test_stage_two_and_inference_follow_words_alone() -> None:
    router = StableMoe(SHAPE, stage_one_steps=5)
    light = (router.words[WORDS] @ router.light_weight.T).argmax(-1)
    for fields in ({"training": True, "step": 5}, {"training": False, "step": 0}):
        for seed in (1, 2):
            routing = router(given(tokens(seed), **fields))
            assert torch.equal(routing.expert_ids, light[routing.token_ids])
            products = tokens(seed) @ router.weight.T
            expected = products.sigmoid()[routing.token_ids, routing.expert_ids]
            torch.testing.assert_close(routing.weights, expected)
            assert not routing.losses


def test_stage_two_leaves_the_light_router_frozen() -> None:
    router = StableMoe(SHAPE, stage_one_steps=0)
    routing = router(given(tokens(), training=True))
    (routing.weights.sum() + routing.logits.sum()).backward()
    assert router.weight.grad is not None
    assert router.words.grad is None
    assert router.light_weight.grad is None


def test_the_light_router_learns_the_backbones_choice() -> None:
    router = StableMoe(SHAPE)
    centers = 4 * torch.randn(12, 16, generator=torch.Generator().manual_seed(5))
    x = 0.5 * tokens() + centers[WORDS]
    optimizer = torch.optim.Adam([router.words, router.light_weight], lr=0.05)
    for _ in range(40):
        loss = router(given(x, training=True)).losses["distil"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned, taught = router(given(x)), router(given(x, training=True))
    same = torch.zeros(60, 4)
    for routing in (learned, taught):
        same[routing.token_ids, routing.expert_ids] += 1
    assert (same == 2).any(-1).float().mean() > 0.9


def test_bigrams_mean_the_word_and_the_one_before_also_when_decoding() -> None:
    router = StableMoe(SHAPE, context="bigram")
    sequences, positions = torch.arange(60) // 30, torch.arange(60) % 30
    whole = router(given(tokens(), sequence_ids=sequences, positions=positions))
    before = torch.where(positions == 0, torch.arange(60), torch.arange(60) - 1)
    features = (router.words[WORDS] + router.words[WORDS[before]]) / 2
    torch.testing.assert_close(whole.logits, features @ router.light_weight.T)
    history: dict[str, torch.Tensor] = {}
    for position in range(30):
        rows = torch.tensor([position, 30 + position])
        step = router(
            RouterInput.of(
                tokens()[rows],
                token_ids=WORDS[rows],
                sequence_ids=sequences[rows],
                positions=positions[rows],
                decoding=position > 0,
                history=history,
            )
        )
        history = dict(step.history)
        torch.testing.assert_close(step.logits, whole.logits[rows])
