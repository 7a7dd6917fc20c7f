"""Experts and forms in a model: saved, loaded, generated with, trained, checkpointed, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.tiny_models import some_ids, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from mixtura.errors import UnsupportedModelError, UserError
from mixtura.machine.releases import checkpoint_layers, with_cache
from mixtura.methods import names
from mixtura.modeling.family import MixturaForCausalLM, export
from mixtura.modeling.parts import bank_of


def of_experts(name: str) -> dict[str, Any]:
    """Layers of these experts."""
    return {"experts": name, "d_expert": 1 if name == "atomic" else 16, "balancers": ["switch_loss"]}


LAYERS: dict[str, dict[str, Any]] = {name: of_experts(name) for name in names("experts") if name != "ffn"}
LAYERS |= {name: {"form": name, "balancers": ["loss_free"], "shared_width": 8} for name in names("forms")}
LAYERS |= {
    "monet": {
        "router": {"name": "monet", "num_heads": 2, "per_head": 2}, "experts": "product", "num_experts": 16,
        "balancers": ["switch_loss"],
    },
    "omni": {
        "router": {"name": "product_key", "top_k": 3}, "experts": "atomic", "num_experts": 30, "d_expert": 1,
        "balancers": ["switch_loss", "z_loss"],
    },
    "memory": {"experts": {"name": "gru_ffn", "memory": "sequence"}, "balancers": ["switch_loss"]},
    "chain_of_convolutions": {
        "form": "chain", "experts": "conv", "router": "similarity_aware", "balancers": ["switch_loss"]
    },
    "chain_of_products": {"form": "chain", "router": "monet", "experts": "product", "num_experts": 16},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(LAYERS))
def model(request: pytest.FixtureRequest) -> MixturaForCausalLM:
    return tiny_model(LAYERS[request.param])


def test_saved_and_loaded_again_to_the_bit(model: MixturaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    kept = again.state_dict()
    assert kept.keys() == model.state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    # Products of the same matrices differ in their last bit where these begin elsewhere in memory.
    torch.testing.assert_close(again(some_ids()).logits, model(some_ids()).logits, rtol=1e-5, atol=1e-5)


def test_decoding_with_a_cache_is_the_whole_pass(model: MixturaForCausalLM) -> None:
    ids = some_ids()
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    parts = [
        model(ids[:, a:b], **with_cache(cache), use_cache=True).logits for a, b in ((0, 4), (4, 5), (5, 10))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    made = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(model(made).logits[:, 9:-1].argmax(-1), made[:, 10:])


def test_padding_and_other_rows_change_nothing(model: MixturaForCausalLM) -> None:
    ids = some_ids(1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    both = torch.cat([padded, some_ids(1, 13, seed=5)])
    masks = torch.cat([mask, torch.ones_like(mask)])
    shifted = model(both, attention_mask=masks, position_ids=(masks.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(shifted[:1, 3:], model(ids).logits, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_gives_the_same_gradients(model: MixturaForCausalLM) -> None:
    ids = some_ids()
    kept = {}
    for again in (False, True):
        fresh = MixturaForCausalLM(model.config).train()
        if again:
            checkpoint_layers(fresh)
        torch.autograd.backward(fresh(ids, labels=ids).loss)
        kept[again] = {name: one.grad for name, one in fresh.named_parameters()}
    missing = [name for name, slope in kept[False].items() if slope is None]
    assert not missing
    for name, slope in kept[False].items():
        torch.testing.assert_close(kept[True][name], slope)


@pytest.mark.parametrize("moe", [{}, {"pool": 2}, {"form": {"name": "chain", "iterations": 3}}])
def test_losses_of_what_experts_are_made_of_count_once(moe: dict[str, Any]) -> None:
    made = tiny_model({"experts": "subspace", "balancers": [], **moe}).train()
    ids = some_ids()
    banks = {id(bank): bank for block in made.model.blocks for bank in [bank_of(block)]}
    wanted = sum(float(bank.losses()["topology"]) for bank in banks.values())
    assert len(banks) == 2
    assert float(made(ids, labels=ids).aux_loss) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("moe", "says"),
    [
        ({"experts": "latnt"}, "did you mean 'latent'"),
        ({"experts": {"name": "latent", "widht": 3}}, "did you mean 'width'"),
        ({"form": "chian"}, "did you mean 'chain'"),
        ({"experts": {"name": "latent", "num_groups": 3}}, "must divide the 4 experts"),
        ({"experts": "atomic"}, "d_expert must be 1"),
        ({"experts": "product", "d_expert": 15}, "d_expert must be even"),
        ({"experts": 3}, "experts is written as a name"),
        (
            {"experts": "conv", "router": "autonomy_of_experts"},
            "which Conv has not; choose experts with the tag",
        ),
        ({"experts": "conv", "router": None, "mixer": "dense"}, "Dense runs or reads the experts' matrices"),
        ({"form": "modulated", "router": None, "mixer": "dense"}, "routers read other tokens than experts"),
        ({"experts": "conv", "pool": 2}, "must be matrices of one kind, got Conv"),
        ({"form": "chain", "pool": 2}, "whose experts belong to no pool"),
        ({"experts": "latent", "balancers": ["conflict_loss"]}, "no matrices of each expert"),
        ({"experts": "conv", "balancers": ["erc_loss"]}, "the experts conv have no matrices"),
        ({"router": "product_key", "capacity": 1.0}, "so it takes no capacity"),
        ({"router": "product_key", "balancers": ["loss_free"]}, "reads no selection bias"),
        ({"router": "product_key", "balancers": ["erc_loss"]}, "rows and columns of a grid"),
    ],
)
def test_what_does_not_go_together_is_said(moe: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        tiny_model(moe)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("moe", "says"),
    [
        ({"form": "chain"}, "layers of the form chain"),
        ({"experts": "ternary"}, "not ternary"),
        ({"experts": {"name": "ffn", "activation": "gelu"}}, "not ffn, activation gelu"),
    ],
)
def test_what_no_family_has_is_not_exported(tmp_path: Path, moe: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        export(tiny_model(moe, query_key_norm="none"), tmp_path / "out")
