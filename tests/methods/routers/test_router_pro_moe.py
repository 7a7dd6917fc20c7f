"""What the router pro_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import SettingError, UserError
from mixtura.methods.routers.pro_moe import ProMoe
from mixtura.types import LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)
CONDITIONAL = torch.arange(30) % 3  # every third token is unconditional


def tokens() -> torch.Tensor:
    return torch.randn(30, 16, generator=torch.Generator().manual_seed(0))


def routed(router: ProMoe, conditional: torch.Tensor = CONDITIONAL, **more: bool) -> Routing:
    return router(RouterInput.of(tokens(), labels={"conditional": conditional}, **more))


def test_unconditional_tokens_have_the_last_expert_to_themselves() -> None:
    routing = routed(ProMoe(SHAPE, per_token=2))
    own = routing.expert_ids == 5
    assert routing.token_ids[own].tolist() == list(range(0, 30, 3))
    assert (routing.weights[own] == 1).all()
    assert (CONDITIONAL[routing.token_ids[~own]] != 0).all()
    assert routing.token_ids.bincount().tolist() == [1, 2, 2] * 10


@pytest.mark.parametrize("weigh_by", ["softmax", "sigmoid", "cosine"])
def test_the_others_go_to_the_nearest_prototypes(weigh_by: str) -> None:
    router = ProMoe(SHAPE, per_token=2, weigh_by=weigh_by)
    routing = routed(router)
    for token in range(30):
        if token % 3 == 0:
            continue
        mine = routing.token_ids == token
        cosines = F.cosine_similarity(tokens()[token], router.prototypes)
        assert set(routing.expert_ids[mine].tolist()) == set(cosines.topk(2).indices.tolist())
        rated = {"softmax": cosines.softmax(-1), "sigmoid": cosines.sigmoid(), "cosine": cosines}[weigh_by]
        torch.testing.assert_close(routing.weights[mine], rated[routing.expert_ids[mine]])


def test_tokens_of_unknown_condition_count_as_conditional() -> None:
    routing = routed(ProMoe(SHAPE), torch.full((30,), -1))
    assert routing.load[5] == 0
    assert routing.load.sum() == 30


@pytest.mark.parametrize("per_token", [1, 2])
def test_the_contrastive_loss_by_hand(per_token: int) -> None:
    router = ProMoe(SHAPE, per_token=per_token, temperature=0.2, contrastive_coefficient=3.0)
    routing = routed(router, training=True)
    kept = [expert for expert in range(5) if routing.load[expert]]
    means = [tokens()[routing.token_ids[routing.expert_ids == expert]].mean(0) for expert in kept]
    losses = []
    for place, expert in enumerate(kept):
        cosines = torch.stack([F.cosine_similarity(router.prototypes[expert], m, dim=0) for m in means])
        losses.append(-(cosines / 0.2).log_softmax(-1)[place])
    assert len(kept) > 2
    torch.testing.assert_close(routing.losses["contrastive"], 3.0 * sum(losses) / len(kept))
    assert not routed(router).losses


def test_the_contrastive_loss_draws_prototypes_apart_and_to_their_tokens() -> None:
    router = ProMoe(SHAPE)
    with torch.no_grad():
        # Nearly all alike at first.
        router.prototypes.copy_(router.prototypes[:1] + 0.05 * router.prototypes)
    first = routed(router, training=True).losses["contrastive"].item()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        routed(router, training=True).losses["contrastive"].backward()
        optimizer.step()
    assert routed(router, training=True).losses["contrastive"].item() < 0.5 * first


def test_one_prototype_alone_has_nothing_to_contrast_with() -> None:
    router = ProMoe(LayerShape(d_model=16, d_expert=8, num_experts=2))
    assert routed(router, training=True).losses["contrastive"].item() == 0


def test_labels_are_asked_for_by_name() -> None:
    with pytest.raises(UserError, match="labels named 'conditional'"):
        ProMoe(SHAPE)(RouterInput.of(tokens()))


def test_one_expert_is_too_few() -> None:
    with pytest.raises(SettingError, match=r"ProMoe keeps one expert .* needs two at least, got 1"):
        ProMoe(LayerShape(d_model=4, d_expert=8, num_experts=1))
