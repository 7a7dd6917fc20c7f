"""What the router monet promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.monet import Monet
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=4, num_experts=262_144)


def tokens() -> torch.Tensor:
    return torch.randn(40, 16, generator=torch.Generator().manual_seed(0))


def test_about_as_many_pass_as_asked_for() -> None:
    rows, columns = Monet(SHAPE, per_head=32)(RouterInput.of(tokens())).gates
    for gates in (rows, columns):
        torch.testing.assert_close(gates.sum(-1), torch.ones(40, 8))
        assert 26 < (gates > 0).sum(-1).float().mean() < 38


def test_the_highest_passes_always() -> None:
    rows, _ = Monet(LayerShape(16, 4, 9), per_head=1)(RouterInput.of(tokens())).gates
    assert ((rows > 0).sum(-1) >= 1).all()


def test_layers_of_a_group_have_the_same_gates() -> None:
    router = Monet(LayerShape(16, 4, 64), num_shared=2, num_layers=4)
    first = router(RouterInput.of(tokens()))
    second = router(RouterInput.of(-tokens(), layer=1, state=first.state))
    third = router(RouterInput.of(-tokens(), layer=2, state=second.state))
    assert torch.equal(first.gates[0], second.gates[0])
    assert not torch.equal(first.gates[0], third.gates[0])
    assert router.row_weight.shape == (2, 8 * 8, 16)


def test_a_layer_too_many_is_refused() -> None:
    with pytest.raises(UserError, match="give it num_layers="):
        Monet(LayerShape(16, 4, 64))(RouterInput.of(tokens(), layer=4))
