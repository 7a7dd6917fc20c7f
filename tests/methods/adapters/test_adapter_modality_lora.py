"""What the adapter modality_lora promises beyond its kind's contract."""

from __future__ import annotations

import math

import torch
from methods.adapters.adapter_sites import experts_site

from mixtura.authoring.contracts import sample_trace
from mixtura.methods import load_method
from mixtura.methods.adapters._transport import coupling, distances


def test_the_least_reached_experts_take_what_is_new() -> None:
    cls = load_method("adapters", "modality_lora")
    trace = sample_trace(num_layers=1, num_experts=4, top_k=1)
    loads = trace.layers[0].counts.double().sum(0)
    found = cls.settings_from(trace, {"share": 0.5})["experts"]["0"]
    assert len(found) == 2
    assert max(float(loads[e]) for e in found) <= min(float(loads[e]) for e in range(4) if e not in found)
    assert cls.settings_from(trace, {"experts": [1]}) == {}


def test_points_are_coupled_with_their_own_after_turning_and_shuffling() -> None:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    turned, _ = torch.linalg.qr(torch.randn(5, 3, generator=generator, dtype=torch.float64))
    order = torch.randperm(12, generator=generator)
    plan = coupling(distances(first), distances((first @ turned.T)[order]))
    torch.testing.assert_close(plan.sum(0), torch.full((12,), 1 / 12, dtype=torch.float64), atol=1e-3, rtol=0)
    assert int((plan.argmax(1) == order.argsort()).sum()) >= 10


def test_new_tokens_begin_along_the_directions_that_go_with_old_ones() -> None:
    made = load_method("adapters", "modality_lora")(experts_site(), first_token=20, rank=2)
    before = made.up_a.clone()
    table = torch.randn(40, 16, generator=torch.Generator().manual_seed(4))
    table[20:, 3:] = 0
    made.begin(table)
    assert not torch.equal(made.up_a, before)
    # The new tokens span three features, and so do the directions.
    assert float(made.up_a[:, :, 3:].abs().max()) < 1e-6
    lengths = made.up_a.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, math.sqrt(1 / 3)))
