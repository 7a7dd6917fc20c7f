"""What the router mask_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.mask_moe import MaskMoe
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=8)
COUNTS = torch.tensor([5, 100, 1, 40, 2, 30, 1, 1, 0, 20])


def fitted(**settings: int) -> MaskMoe:
    router = MaskMoe(SHAPE, num_words=10, num_visible=3, frequent_share=0.8, **settings)
    router.refit(COUNTS)
    return router


def tokens(count: int = 40) -> RouterInput:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, SHAPE.d_model, generator=generator)
    return RouterInput.of(x, token_ids=torch.arange(count) % 10)


def test_the_most_used_entries_of_the_share_see_several_experts_the_rest_one() -> None:
    # Of 200: entries 1 and 3 make 140, entry 5 reaches 170 >= 160.
    assert fitted().visible.sum(-1).tolist() == [1, 3, 1, 3, 1, 3, 1, 1, 1, 1]


def test_a_word_keeps_the_experts_it_had_when_others_become_frequent() -> None:
    router = fitted()
    before = router.visible.clone()
    router.refit(COUNTS.flip(0))
    after = router.visible
    both = before & after
    assert (both.sum(-1) == torch.minimum(before.sum(-1), after.sum(-1))).all()


@pytest.mark.parametrize("num_choices", [1, 2])
def test_routes_by_a_softmax_over_the_visible_by_a_plain_loop(num_choices: int) -> None:
    router = fitted(num_choices=num_choices)
    inputs = tokens()
    routing = router(inputs)
    logits = (inputs.x @ router.weight.T).detach()
    for token in range(40):
        seen = router.visible[token % 10].nonzero().squeeze(-1).tolist()
        scores = dict(zip(seen, logits[token, seen].softmax(-1).tolist(), strict=True))
        best = sorted(sorted(seen, key=lambda e: -scores[e])[:num_choices])
        mine = routing.token_ids == token
        assert routing.expert_ids[mine].tolist() == best
        assert routing.weights[mine].tolist() == pytest.approx([scores[e] for e in best])


def test_a_rare_word_always_has_its_one_expert_with_weight_1() -> None:
    routing = fitted()(tokens(200))
    rare = routing.token_ids % 10 == 2
    assert routing.expert_ids[rare].unique().numel() == 1
    assert (routing.weights[rare] == 1).all()
    frequent = routing.token_ids % 10 == 1
    assert routing.expert_ids[frequent].unique().numel() > 1


def test_masks_use_all_experts_alike_and_come_from_the_seed() -> None:
    one, again, other = (MaskMoe(SHAPE, num_words=4000, seed=seed).visible for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    load = one.sum(0).float()
    assert load.max() / load.mean() < 1.15


def test_before_any_counts_low_ids_are_the_frequent_ones() -> None:
    seen = MaskMoe(SHAPE, num_words=1000).visible.sum(-1)
    assert seen[0] == 2
    assert (seen.diff() <= 0).all()
    assert 0.02 < (seen == 2).float().mean() < 0.2


def test_counts_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(UserError, match="made for 10 vocabulary entries"):
        fitted().refit(torch.ones(11))
