"""Adapters of linear layers in models of mixtura's own, whatever their attention is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modeling.tiny_models import some_ids, tiny_model
from peft import get_peft_model

from mixtura.adapting import AdapterConfig


@pytest.mark.parametrize(
    "attention", ["grouped_query", {"name": "attention_experts", "num_experts": 2, "keys": "shared"}]
)
def test_an_adapted_model_begins_as_it_was_and_learns(attention: Any) -> None:
    model, ids = tiny_model(attention=attention), some_ids()
    with torch.no_grad():
        wanted = model(ids).logits
    adapted = get_peft_model(model, AdapterConfig(method="lora", settings={"rank": 2}, task_type="CAUSAL_LM"))
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=ids).logits, wanted)
    adapted(input_ids=ids, labels=ids).loss.backward()
    slopes = {name: one.grad for name, one in adapted.named_parameters() if one.requires_grad}
    assert any("q_proj" in name for name in slopes)
    assert all(slope is not None for slope in slopes.values())
    assert any(float(slope.abs().sum()) > 0 for slope in slopes.values() if slope is not None)
