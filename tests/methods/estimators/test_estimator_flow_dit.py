"""A flow's transformer by loops: patches, turning, experts; samples of a class, and the class of a row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._flows import FlowBlock, SparseLayer, rotated
from mixtura.methods.estimators.flow_dit import FlowDit

GENERATOR = np.random.default_rng(0)
Y = np.array(["down", "up"])[np.arange(80) % 2]
X = np.where(Y[:, None] == "up", 1.0, -1.0) * np.tile([1.0, -1.0], 8) + 0.3 * GENERATOR.normal(size=(80, 16))
SMALL = {"grid": [4, 4], "side": 2, "d_model": 8, "num_heads": 1, "d_expert": 4, "num_experts": 3, "top_k": 2}


@pytest.fixture(scope="module")
def model() -> FlowDit:
    return FlowDit(**SMALL, epochs=30, num_probes=2).fit(X, Y)  # type: ignore[arg-type]


def test_turning_depends_on_how_far_patches_are_apart() -> None:
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64) for _ in range(2))

    def met(a: tuple[int, int], b: tuple[int, int]) -> float:
        return float((rotated(q, torch.tensor([a])) * rotated(k, torch.tensor([b]))).sum())

    assert met((1, 2), (3, 5)) == pytest.approx(met((4, 0), (6, 3)))
    assert met((1, 2), (3, 5)) != pytest.approx(met((1, 2), (5, 3)))
    angle = 3.0
    turned = rotated(torch.tensor([1.0, 0, 0, 0]).double()[None, None, None], torch.tensor([[3, 0]]))
    assert turned.flatten()[:2].tolist() == pytest.approx([math.cos(angle), math.sin(angle)])


def test_a_block_is_the_identity_at_first() -> None:
    block = FlowBlock(FlowDit(**SMALL), True, 0).double().eval()  # type: ignore[arg-type]
    h, c = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    made, routing = block(h, c, torch.cartesian_prod(torch.arange(2), torch.arange(2)))
    assert torch.equal(made, h)
    assert routing is not None
    assert routing.num_tokens == 8


def test_experts_by_a_loop() -> None:
    layer = SparseLayer(FlowDit(**SMALL), 0).double().eval()  # type: ignore[arg-type]
    x = torch.randn(6, 8, dtype=torch.float64)
    made, _ = layer(x)
    for row in range(6):
        scores = torch.sigmoid(layer.gate.weight.double() @ x[row])
        best = scores.topk(2)
        wanted = layer.shared(x[row])
        for score, number in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            one = layer.experts[number]
            wanted = wanted + score * one.down.weight @ (
                F.silu(one.gate.weight @ x[row]) * (one.up.weight @ x[row])
            )
        assert torch.allclose(made[row], wanted, atol=1e-5)


def test_the_bias_moves_against_the_load() -> None:
    layer = SparseLayer(FlowDit(**SMALL), 0).double().train()  # type: ignore[arg-type]
    _, routing = layer(torch.randn(40, 8, dtype=torch.float64))
    mean = 40 * 2 / 3
    assert layer.bias.tolist() == pytest.approx(
        [1e-3 * math.copysign(1, mean - n) for n in routing.load.tolist()]
    )


def test_patches_are_squares_of_the_image() -> None:
    flow = FlowDit(**SMALL, epochs=1).fit(X, Y).module_.flow  # type: ignore[arg-type]
    z = torch.zeros(1, 16, dtype=torch.float64)
    with torch.no_grad():
        flow.writes.weight.zero_()
        flow.writes.bias.copy_(torch.arange(4.0))
    made, _ = flow(z, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.long))
    assert made.reshape(4, 4).tolist() == [[0, 1, 0, 1], [2, 3, 2, 3]] * 2


def test_a_class_is_the_one_that_errs_least(model: FlowDit) -> None:
    net = model.module_
    shares = model.predict_proba(X[:4])
    for row in range(4):
        x = torch.from_numpy((X[row] - model.mean_) / model.scale_)[None]
        errors = []
        for label in range(2):
            total = 0.0
            for noise, time in zip(net.noise, net.times, strict=True):
                speed, _ = net.flow(time * x + (1 - time) * noise, time[None], torch.tensor([label]))
                total += float((speed.detach() - (x - noise)).square().sum())
            errors.append(-total / 2)
        assert np.allclose(shares[row], F.softmax(torch.tensor(errors, dtype=torch.float64), 0))


def test_samples_are_of_their_class(model: FlowDit) -> None:
    for name in ("down", "up"):
        drawn = model.sample(40, y=name)
        assert np.abs(drawn.mean(0) - X[name == Y].mean(0)).mean() < 0.5
    assert np.array_equal(model.sample(3, seed=1), model.sample(3, seed=1))
    assert not np.array_equal(model.sample(3, seed=1), model.sample(3, seed=2))
    assert model.score(X, Y) > 0.9
    with pytest.raises(UserError, match="there is no class 'left'"):
        model.sample(1, y="left")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"grid": [3, 4]}, "a product of 16"),
        ({"grid": [2, 8], "side": 4}, "each a multiple of side"),
        ({"d_model": 12, "num_heads": 2}, "d_model of FlowDit must be a multiple of 8, got 12"),
        ({"num_layers": 1}, "num_layers of FlowDit"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        FlowDit(epochs=1, **settings).fit(X, Y)  # type: ignore[arg-type]
