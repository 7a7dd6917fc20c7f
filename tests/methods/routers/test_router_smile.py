"""What the router smile promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.routers.smile import Smile
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=8, num_experts=6)


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shared_rows", [True, False])
def test_equals_a_plain_loop_over_tokens(shared_rows: bool) -> None:
    router = Smile(SHAPE, num_nodes=2, shared_rows=shared_rows)
    assert router.local_weight.shape == ((3, 8) if shared_rows else (6, 8))
    x = tokens()
    routing = router(RouterInput.of(x))
    found = torch.zeros(40, 6)
    found[routing.token_ids, routing.expert_ids] = routing.weights
    expected = torch.zeros(40, 6)
    for token in range(40):
        nodes = (router.node_weight @ x[token]).softmax(-1)
        node = int(nodes.argmax())
        rows = router.local_weight if shared_rows else router.local_weight[3 * node : 3 * node + 3]
        local = (rows @ x[token]).softmax(-1)
        expected[token, 3 * node + int(local.argmax())] = nodes.max() * local.max()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(40))


def test_two_losses_by_hand() -> None:
    router = Smile(SHAPE, num_nodes=2, shared_rows=False, inter_coefficient=2.0, intra_coefficient=5.0)
    x = tokens()
    valid = torch.arange(40) < 32
    losses = router(RouterInput(x=x, valid=valid)).losses
    x = x[:32]
    nodes = (x @ router.node_weight.T).softmax(-1)
    node = nodes.argmax(-1)
    inter = 2 * sum((node == i).float().mean() * nodes[:, i].mean() for i in range(2))
    torch.testing.assert_close(losses["inter_node"], 2.0 * inter)
    intra = torch.zeros(())
    for i in range(2):
        mine = x[node == i]
        local = (mine @ router.local_weight[3 * i : 3 * i + 3].T).softmax(-1)
        shares = local.argmax(-1).bincount(minlength=3) / len(mine)
        intra = intra + len(mine) / 32 * 3 * (shares * local.mean(0)).sum()
    torch.testing.assert_close(losses["intra_node"], 5.0 * intra)


def test_the_loss_within_nodes_sees_each_node_apart() -> None:
    router = Smile(SHAPE, num_nodes=2, shared_rows=False, intra_coefficient=1.0)
    with torch.no_grad():
        router.node_weight.zero_()[0, 0] = 50.0
        # Node 0 always takes its first expert, node 1 always its second: places alone look more even.
        router.local_weight.zero_()
        router.local_weight[0, 1] = router.local_weight[4, 1] = 50.0
    x = torch.zeros(4, 8)
    x[:, 0], x[:, 1] = torch.tensor([1.0, 1.0, -1.0, -1.0]), 1.0
    routing = router(RouterInput.of(x))
    assert routing.expert_ids.tolist() == [0, 0, 4, 4]
    torch.testing.assert_close(routing.losses["intra_node"], torch.tensor(3.0))
    torch.testing.assert_close(routing.losses["inter_node"], torch.tensor(0.01))


def test_nodes_must_divide_the_experts() -> None:
    with pytest.raises(SettingError, match="must divide the 6 experts"):
        Smile(SHAPE, num_nodes=4)


@pytest.mark.parametrize("shared_rows", [True, False])
def test_the_softmax_of_the_logits_is_the_scores(shared_rows: bool) -> None:
    routing = Smile(SHAPE, num_nodes=2, shared_rows=shared_rows)(RouterInput.of(tokens()))
    torch.testing.assert_close(routing.logits.softmax(-1), routing.scores)
