"""Another order of experts computes the same, and lays them as the placement says."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model

from mixtura.authoring.contracts import sample_cluster
from mixtura.checkpoints.view import open_model
from mixtura.errors import UserError
from mixtura.methods import create
from mixtura.running.parallel.planning import trace_of_sizes
from mixtura.running.parallel.reordering import reorder


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "minimax_m2"])
def test_the_model_computes_what_it_did(family: str) -> None:
    model = tiny_model(family, seed=0).double().eval()
    ids = torch.arange(3, 33).view(2, 15)
    view = open_model(model)
    sizes = [(one.index, 8, 8, one.num_experts, 2) for one in view.layers]
    made = create("placements", "random", seed=3).plan(trace_of_sizes(sizes), sample_cluster(2, 2))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        first = view.layers[0]
        old = [first.expert(expert).down.clone() for expert in range(first.num_experts)]
        reorder(model, made)
        # Routers' softmax is in float32 in some families, and its sum has an order.
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0.0, atol=1e-6)
    held = made.layers[0].held(4)
    now = open_model(model).layers[0]
    for place in range(first.num_experts):
        expert = [one for experts in held for one in experts][place]
        assert torch.equal(now.expert(place).down, old[expert])


def test_what_is_no_order_is_refused() -> None:
    model = tiny_model("qwen3_moe", seed=0)
    sizes = [(one.index, 8, 8, 8, 2) for one in open_model(model).layers]
    made = create("placements", "expert_data_parallel").plan(trace_of_sizes(sizes), sample_cluster(2, 2))
    with pytest.raises(UserError, match="layer 0 has experts on several devices"):
        reorder(model, made)
