"""The MoE layer: router, experts, sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from mixtura.errors import SettingError, UserError
from mixtura.methods import create
from mixtura.methods.balancers.switch_loss import SwitchLoss
from mixtura.methods.settings import construct
from mixtura.modeling.layer import (
    Capacity,
    ExpertMatrices,
    ExpertPool,
    Experts,
    MoELayer,
    SharedExpert,
    swiglu,
)
from mixtura.types import BalancerInput, LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=24, num_experts=6)


def tokens(count: int = 20) -> Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def by_loop(layer: MoELayer, x: Tensor, routing: Routing) -> Tensor:
    """The layer's output, one assignment after another."""
    output = torch.zeros_like(x)
    for token, expert, weight in zip(routing.token_ids, routing.expert_ids, routing.weights, strict=True):
        hidden = swiglu(layer.experts.gate_up_proj[expert] @ x[token])
        output[token] += weight * (layer.experts.down_proj[expert] @ hidden)
    return output


def test_equals_a_loop() -> None:
    layer = MoELayer(create("routers", "top_k", SHAPE), Experts(SHAPE))
    inputs = RouterInput(x=tokens(), valid=torch.arange(20) < 17)
    output, routing = layer(inputs)
    torch.testing.assert_close(output, by_loop(layer, inputs.x, routing))
    assert (output[17:] == 0).all()


def test_equals_the_block_of_qwen3_moe() -> None:
    config = Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True
    )
    config._experts_implementation = "eager"
    theirs = Qwen3MoeSparseMoeBlock(config)
    ours = MoELayer(create("routers", "top_k", SHAPE, top_k=2), Experts(SHAPE))
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(ours.experts.gate_up_proj)
        theirs.experts.down_proj.copy_(ours.experts.down_proj)
    x = tokens()
    output, _ = ours(RouterInput.of(x))
    expected = theirs(x[None])
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(output, expected[0] if expected.dim() == 3 else expected)


def test_gradients_are_right() -> None:
    layer = MoELayer(create("routers", "top_k", SHAPE, top_k=2), Experts(SHAPE)).double()
    x = tokens(5).double().requires_grad_()
    parameters = list(layer.parameters())

    def output(x: Tensor, *_: Tensor) -> Tensor:
        return layer(RouterInput.of(x))[0]

    assert torch.autograd.gradcheck(output, (x, *parameters), fast_mode=True)


def test_a_step_on_the_balancing_loss_evens_the_load() -> None:
    layer = MoELayer(create("routers", "switch", SHAPE, capacity_factor=10.0), Experts(SHAPE))
    x = tokens(200) + 1.0
    with torch.no_grad():
        layer.router.weight[0] += 0.3
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=1.0)
    balancer = SwitchLoss(coefficient=0.1)
    shares = []
    for _ in range(30):
        _, routing = layer(RouterInput.of(x))
        shares.append(routing.load.max().item() / 200)
        optimizer.zero_grad()
        balancer.loss(BalancerInput(routing=routing)).backward()
        optimizer.step()
    assert shares[0] > 0.6
    assert shares[-1] < 0.4


def test_seeds_decide_the_experts() -> None:
    assert torch.equal(Experts(SHAPE, seed=1).down_proj, Experts(SHAPE, seed=1).down_proj)
    assert not torch.equal(Experts(SHAPE, seed=1).down_proj, Experts(SHAPE, seed=2).down_proj)


def test_experts_of_a_handle_are_those_of_the_layer() -> None:
    experts = Experts(SHAPE)
    handle = experts.matrices
    assert handle.shape == SHAPE
    x = tokens(3)
    found = handle.run(x, torch.tensor([2, 0, 0]), torch.tensor([5, 1, 1]))
    assert handle.gate is not None
    expected = handle.down[5] @ (torch.nn.functional.silu(handle.gate[5] @ x[2]) * (handle.up[5] @ x[2]))
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], found[2])


def test_experts_without_a_gate() -> None:
    up, down = torch.randn(2, 4, 3), torch.randn(2, 3, 4)
    plain = ExpertMatrices(up, down, activation=torch.relu, gated=False)
    assert plain.gate is None
    assert torch.equal(plain.up, up)
    x = torch.randn(1, 3)
    found = plain.run(x, torch.tensor([0]), torch.tensor([1]))
    torch.testing.assert_close(found[0], down[1] @ torch.relu(up[1] @ x[0]))


def test_merged_experts_have_the_mean_of_the_matrices() -> None:
    handle = Experts(SHAPE).matrices
    mix = torch.tensor([[0.25, 0.75, 0, 0, 0, 0]])
    merged = handle.merged(mix)
    torch.testing.assert_close(merged.gate_up[0], 0.25 * handle.gate_up[0] + 0.75 * handle.gate_up[1])
    torch.testing.assert_close(merged.down[0], 0.25 * handle.down[0] + 0.75 * handle.down[1])


def test_a_pool_is_the_experts_of_its_members() -> None:
    own, neighbour = Experts(SHAPE, seed=0), Experts(SHAPE, seed=1)
    pool = ExpertPool([own, neighbour])
    layer = MoELayer(create("routers", "top_k", pool.shape, top_k=3), pool)
    x = tokens()
    output, routing = layer(RouterInput.of(x))
    assert (routing.expert_ids >= SHAPE.num_experts).any()
    made = pool.matrices.run(x, routing.token_ids, routing.expert_ids)
    expected = torch.zeros_like(x).index_add(0, routing.token_ids, made * routing.weights[:, None])
    torch.testing.assert_close(output, expected)
    assert {id(p) for p in pool.parameters()} == {id(p) for m in (own, neighbour) for p in m.parameters()}


def test_layers_share_routers_and_pools_by_holding_the_same() -> None:
    router, experts = create("routers", "top_k", SHAPE), Experts(SHAPE)
    model = torch.nn.ModuleList(MoELayer(router, experts) for _ in range(3))
    assert len(list(model.parameters())) == 3


@pytest.mark.parametrize("gated", [False, True])
def test_a_shared_expert_is_added_to_every_valid_token(gated: bool) -> None:
    shared = SharedExpert(16, 8, gated=gated, seed=3)
    with_it = MoELayer(create("routers", "top_k", SHAPE), Experts(SHAPE), shared=shared)
    without = MoELayer(create("routers", "top_k", SHAPE), Experts(SHAPE))
    inputs = RouterInput(x=tokens(), valid=torch.arange(20) < 17)
    added = with_it(inputs)[0] - without(inputs)[0]
    expected = shared.experts.matrices.run(inputs.x, torch.arange(20), torch.zeros(20, dtype=torch.long))
    if shared.gate is not None:
        expected = expected * torch.sigmoid(inputs.x @ shared.gate[0, 0])[:, None]
    torch.testing.assert_close(added[:17], expected[:17], rtol=1e-4, atol=1e-5)
    assert (added[17:] == 0).all()


def test_fine_grained_experts_are_as_many_parameters() -> None:
    fine = SHAPE.split(3)
    assert (fine.num_experts, fine.d_expert) == (18, 8)
    counts = [sum(p.numel() for p in Experts(shape).parameters()) for shape in (SHAPE, fine)]
    assert counts[0] == counts[1]
    with pytest.raises(UserError, match="cannot be cut into 5 equal parts"):
        SHAPE.split(5)


def test_nothing_is_dropped_without_a_capacity_and_the_rest_with_one() -> None:
    x = tokens(1).expand(12, -1)
    plain = MoELayer(create("routers", "top_k", SHAPE, top_k=2), Experts(SHAPE))
    assert plain(RouterInput.of(x))[1].load.sum() == 24
    limited = MoELayer(plain.router, plain.experts, capacity=Capacity(factor=1.0))
    output, routing = limited(RouterInput.of(x, training=True))
    assert routing.load.max() == 4  # 24 assignments over 6 experts
    assert routing.demand is not None
    assert routing.demand.max() == 12
    assert (output[4:] == 0).all()


def test_overflow_may_go_to_the_next_best_expert() -> None:
    x = tokens(1).expand(12, -1)
    layer = MoELayer(
        create("routers", "top_k", SHAPE, top_k=1),
        Experts(SHAPE),
        capacity=Capacity(factor=1.0, overflow="next"),
    )
    _, routing = layer(RouterInput.of(x, training=True))
    assert routing.load.tolist() == [2] * 6
    order = routing.scores[0].argsort(descending=True)
    by_token = dict(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True))
    assert [by_token[t] for t in range(12)] == [int(order[t // 2]) for t in range(12)]
    weights = dict(zip(routing.token_ids.tolist(), routing.weights.tolist(), strict=True))
    assert weights[11] == pytest.approx((routing.scores[0, order[5]] / routing.scores[0, order[0]]).item())


def test_room_may_go_to_the_heaviest_first() -> None:
    x = tokens(1) * torch.linspace(0.1, 1.0, 10)[:, None]
    router = create("routers", "top_k", SHAPE, top_k=1, renormalize=False)
    layer = MoELayer(router, Experts(SHAPE), capacity=Capacity(factor=1.2, order="weight"))
    for mode in ({"training": True}, {"causal": False}):
        _, routing = layer(RouterInput.of(x, **mode))
        assert routing.token_ids.tolist() == [8, 9]


@pytest.mark.parametrize("order", ["arrival", "weight"])
def test_a_decoder_at_inference_routes_token_by_token_as_at_once_whatever_the_capacity(order: str) -> None:
    capacity = construct(Capacity, factor=0.5, order=order)
    layer = MoELayer(create("routers", "top_k", SHAPE, top_k=1), Experts(SHAPE), capacity=capacity)
    x = tokens(8)
    whole, _ = layer(RouterInput.of(x))
    steps = [layer(RouterInput.of(x[t : t + 1], decoding=t > 0))[0] for t in range(8)]
    torch.testing.assert_close(torch.cat(steps), whole)


def test_a_pool_must_be_of_as_many_layers_as_the_router_is_set_for() -> None:
    own, other = Experts(SHAPE, seed=0), Experts(SHAPE, seed=1)
    alone = create("routers", "rex_moe", SHAPE, reuse=2)
    with pytest.raises(UserError, match="reuse=2 is for a pool of 2 layers' experts, got 1"):
        MoELayer(alone, own)
    pool = ExpertPool([own, other])
    with pytest.raises(UserError, match="reuse=1 is for a pool of 1 layers' experts, got 2"):
        MoELayer(create("routers", "rex_moe", pool.shape), pool)
    assert MoELayer(create("routers", "rex_moe", pool.shape, reuse=2), pool)(RouterInput.of(tokens(2)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"factor": 0.0}, "factor of Capacity"),
        ({"factor": 1.0, "order": "late"}, "order of Capacity must be"),
        ({"factor": 1.0, "overflow": "nxt"}, "overflow of Capacity must be"),
    ],
)
def test_bad_capacities(given: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        construct(Capacity, **given)


def test_parts_of_different_sizes_are_refused() -> None:
    other = LayerShape(d_model=16, d_expert=24, num_experts=5)
    with pytest.raises(UserError, match="make both of one shape"):
        MoELayer(create("routers", "top_k", other), Experts(SHAPE))
    with pytest.raises(UserError, match="must all have the same widths"):
        ExpertPool([Experts(SHAPE), Experts(LayerShape(16, 8, 6))])


def test_a_mixer_takes_the_place_of_a_router() -> None:
    layer = MoELayer(create("mixers", "soft_moe", SHAPE), Experts(SHAPE))
    output, routing = layer(RouterInput.of(tokens()))
    assert output.shape == (20, 16)
    assert routing.scores.shape == (20, 6)
    with pytest.raises(UserError, match="takes no capacity"):
        MoELayer(create("mixers", "soft_moe", SHAPE), Experts(SHAPE), capacity=Capacity(factor=1.0))


def test_the_layer_hands_its_experts_to_routers_that_read_them() -> None:
    layer = MoELayer(create("routers", "autonomy_of_experts", SHAPE), Experts(SHAPE))
    output, routing = layer(RouterInput.of(tokens()))
    torch.testing.assert_close(output, by_loop(layer, tokens(), routing))


@pytest.mark.parametrize("kind_and_name", [("mixers", "smear"), ("mixers", "soft_moe")])
def test_decoding_with_a_method_that_looks_ahead_is_refused(kind_and_name: tuple[str, str]) -> None:
    layer = MoELayer(create(*kind_and_name, SHAPE), Experts(SHAPE))
    with pytest.raises(UserError, match="needs a sequence's later tokens to decide, so it cannot generate"):
        layer(RouterInput.of(tokens(1), decoding=True))


def test_state_passes_from_layer_to_layer() -> None:
    layers = [
        MoELayer(create("routers", "pre_gated", SHAPE, seed=n), Experts(SHAPE, seed=n)) for n in range(2)
    ]
    x = tokens()
    first, routing = layers[0](RouterInput.of(x))
    _, following = layers[1](RouterInput.of(x + first, layer=1, state=routing.state))
    torch.testing.assert_close(following.logits, x @ layers[0].router.weight.T)
