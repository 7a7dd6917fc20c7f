"""What the router switch promises beyond its kind's contract."""

from __future__ import annotations

import torch
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from mixtura.methods.routers.switch import Switch
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_equals_the_router_of_switch_transformers() -> None:
    ours = Switch(SHAPE, capacity_factor=1.0)
    config = SwitchTransformersConfig(d_model=16, num_experts=4, expert_capacity=10)
    theirs = SwitchTransformersTop1Router(config)
    with torch.no_grad():
        theirs.classifier.weight.copy_(ours.weight)
    x = tokens()
    mask, probabilities, _ = theirs(x[None])
    expected = mask[0] * probabilities[0]
    routing = ours(RouterInput.of(x, causal=False))
    found = torch.zeros(40, 4)
    found[routing.token_ids, routing.expert_ids] = routing.weights
    assert routing.load.max() == 10, "the case must drop tokens"
    torch.testing.assert_close(found, expected)


def test_earlier_tokens_go_first_and_the_rest_are_absent() -> None:
    x = tokens(1).expand(10, -1)
    routing = Switch(SHAPE, capacity_factor=1.25)(RouterInput.of(x, causal=False))
    # 10 tokens want one of 4 experts: room for ceil(1.25 * 10 / 4) = 4.
    assert routing.token_ids.tolist() == [0, 1, 2, 3]
    assert routing.demand is not None
    assert routing.demand.max() == 10


def test_padding_takes_no_room() -> None:
    x = tokens(1).expand(10, -1)
    valid = torch.arange(10) >= 6
    routing = Switch(SHAPE, capacity_factor=2.0)(RouterInput(x=x, valid=valid, training=True))
    assert routing.token_ids.tolist() == [6, 7]


def test_jitter_is_drawn_in_training_from_the_generator_alone() -> None:
    router = Switch(SHAPE, jitter=0.5)
    x = tokens()

    def logits(training: bool, seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return router(RouterInput.of(x, training=training, generator=generator)).logits

    still = logits(False, 1)
    assert torch.equal(still, logits(True, None))
    assert torch.equal(logits(True, 1), logits(True, 1))
    assert not torch.equal(still, logits(True, 1))
    assert not torch.equal(logits(True, 2), logits(True, 1))


def test_computes_in_float32_whatever_the_model() -> None:
    router = Switch(SHAPE).to(torch.bfloat16)
    x = tokens().to(torch.bfloat16)
    routing = router(RouterInput.of(x))
    assert routing.logits.dtype == torch.float32
    assert routing.weights.dtype == torch.bfloat16
    torch.testing.assert_close(routing.logits, x.float() @ router.weight.float().T)


def test_a_decoder_at_inference_has_no_limit() -> None:
    x = torch.ones(10, SHAPE.d_model)
    router = Switch(SHAPE, capacity_factor=1.0)
    assert router(RouterInput.of(x)).load.max() == 10
    for mode in ({"training": True}, {"causal": False}):
        assert router(RouterInput.of(x, **mode)).load.max() == -(-10 // SHAPE.num_experts)
