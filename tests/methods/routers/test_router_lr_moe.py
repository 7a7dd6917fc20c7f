"""What the router lr_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.lr_moe import LrMoe
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=8, num_experts=3)


def tokens(seed: int = 0, count: int = 30) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(seed))


def test_the_first_layer_decides_for_all() -> None:
    router = LrMoe(SHAPE)
    first = router(RouterInput.of(tokens()))
    expected = (tokens() @ router.weight.T).argmax(-1)
    assert torch.equal(first.expert_ids, expected[first.token_ids])
    assert (first.weights == 1).all()
    later = router(RouterInput.of(tokens(1), layer=1, state=first.state))
    last = router(RouterInput.of(tokens(2), layer=2, state=later.state))
    assert torch.equal(last.expert_ids, first.expert_ids)
    assert torch.equal(last.token_ids, first.token_ids)


def test_the_loss_is_cross_entropy_where_languages_are_known() -> None:
    router = LrMoe(SHAPE, coefficient=2.0)
    languages = torch.arange(30) % 3
    languages[:6] = -1
    valid = torch.arange(30) < 24
    given = RouterInput(x=tokens(), valid=valid, labels={"language": languages})
    routing = router(given)
    rows = (tokens() @ router.weight.T).log_softmax(-1)[6:24]
    expected = -rows[torch.arange(18), languages[6:24]].mean()
    torch.testing.assert_close(routing.losses["language"], 2 * expected)
    assert not router(RouterInput.of(tokens(), labels={"language": languages}, state=routing.state)).losses
    assert not router(RouterInput.of(tokens())).losses


def test_training_on_labels_makes_experts_those_of_languages() -> None:
    router = LrMoe(SHAPE, coefficient=1.0)
    languages = torch.arange(90) % 3
    x = tokens(count=90) + 2 * torch.eye(3, 8)[languages]
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    for _ in range(50):
        loss = router(RouterInput.of(x, labels={"language": languages})).losses["language"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    routing = router(RouterInput.of(x))
    assert (routing.expert_ids == languages[routing.token_ids]).float().mean() > 0.85


def test_weights_may_be_probabilities() -> None:
    routing = LrMoe(SHAPE, weighted=True)(RouterInput.of(tokens()))
    torch.testing.assert_close(routing.weights, routing.scores.amax(-1)[routing.token_ids])


def test_bad_labels_and_states() -> None:
    with pytest.raises(UserError, match="languages 0 to 2, got label 3"):
        LrMoe(SHAPE)(RouterInput.of(tokens(count=1), labels={"language": torch.tensor([3])}))
    with pytest.raises(UserError, match="state of 3 logits"):
        LrMoe(SHAPE)(RouterInput.of(tokens(count=1), state=torch.zeros(1, 4)))
