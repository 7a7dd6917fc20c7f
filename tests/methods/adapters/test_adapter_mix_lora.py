"""What the adapter mix_lora promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import torch
from adapting.adapted_models import dense, stir
from peft import get_peft_model

import mixtura
from mixtura.adapting.blocks import BlockLayer
from mixtura.adapting.layers import AdapterLayer


def test_experts_of_a_dense_part_are_whole_parts_with_matrices_of_their_own() -> None:
    config = mixtura.AdapterConfig(
        method="mix_lora", settings={"rank": 2, "num_experts": 3, "alpha": 4.0}, task_type="CAUSAL_LM"
    )
    model = get_peft_model(dense(), config).double().eval()
    stir(model)
    layer = next(one for one in model.modules() if isinstance(one, BlockLayer))
    base: Any = layer.base_layer
    made: Any = layer.adapter("default")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    wanted = torch.zeros_like(x)
    with torch.no_grad():
        for place in [(s, t) for s in range(2) for t in range(5)]:
            scores = (made.router @ x[place]).softmax(-1)
            chosen = scores.topk(2)
            for share, e in zip(chosen.values / chosen.values.sum(), chosen.indices, strict=True):
                gate, up, down = (
                    getattr(base, f"{n}_proj").weight
                    + 2.0 * made.get_parameter(f"{n}_b")[e] @ made.get_parameter(f"{n}_a")[e]
                    for n in ("gate", "up", "down")
                )
                hidden = torch.nn.functional.silu(gate @ x[place]) * (up @ x[place])
                wanted[place] += share * (down @ hidden)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-11)
    attention = [n for n, one in model.named_modules() if isinstance(one, AdapterLayer) and one is not layer]
    assert any(name.endswith("q_proj") for name in attention)
    assert not any("mlp.base_layer" in name for name in attention)
