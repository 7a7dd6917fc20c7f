"""Models whose routers hold tables or values that are not trained, saved and loaded by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtura.modeling.family import MixturaConfig, MixturaForCausalLM


def made(router: object) -> MixturaForCausalLM:
    config = MixturaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe={"router": router, "num_experts": 4, "d_expert": 8},
    )
    return MixturaForCausalLM(config)


def trained_names(model: MixturaForCausalLM) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    "router",
    [
        {"name": "hash", "num_words": 64},
        {"name": "hash", "num_words": 64, "top_k": 3, "assignment": "random"},
        {"name": "mask_moe", "num_words": 64},
        "hyper_router",
        {"name": "hyper_router", "train_hypernet": True},
        "mixer_gate",
    ],
    ids=str,
)
def test_a_loaded_model_is_the_one_that_was_saved_and_trains_the_same_parameters(
    tmp_path: Path, router: object
) -> None:
    model = made(router).eval()
    model.save_pretrained(tmp_path)
    loaded = MixturaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        # Where weights lie in memory can change the last bit of a product.
        torch.testing.assert_close(model(ids).logits, loaded(ids).logits, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert trained_names(model) == trained_names(loaded)
    before = {name: value.clone() for name, value in loaded.named_buffers()}
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loaded.train()(ids, labels=ids).loss.backward()
        optimizer.step()
    kept = [name for name in before if name.endswith(("hidden", "output", "table", "visible", "gate.bias"))]
    after = dict(loaded.named_buffers())
    assert all(torch.equal(before[name], after[name]) for name in kept)
    frozen = {"hyper_router": 4, "mixer_gate": 0}.get(str(router), len(kept))
    assert len(kept) == frozen
