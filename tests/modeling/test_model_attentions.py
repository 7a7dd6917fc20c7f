"""Attentions in a model: saved, decoded, padded, checkpointed, chosen by layer, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.tiny_models import some_ids, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from mixtura.errors import SettingError, UnknownNameError, UnsupportedModelError, UserError
from mixtura.machine.releases import checkpoint_layers, with_cache
from mixtura.modeling.family import MixturaForCausalLM, export

SPARSE = {"name": "sparse_heads", "sparsity": 3, "include_first": True}
ATTENTIONS: dict[str, Any] = {
    "windows_in_turn": [{"name": "grouped_query", "window": 3}, "grouped_query"],
    "sparse": SPARSE,
    "sparse_beside_dense": [SPARSE | {"num_dense": 2}, "grouped_query"],
    "experts": {"name": "attention_experts", "num_experts": 3, "keys": "shared"},
    "selective": {"name": "selective_heads", "positions": "rank", "top_heads": 3},
}


@pytest.fixture(scope="module", params=list(ATTENTIONS))
def model(request: pytest.FixtureRequest) -> MixturaForCausalLM:
    return tiny_model(attention=ATTENTIONS[request.param])


def test_saved_and_loaded_again_to_the_bit(model: MixturaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.attention == model.config.attention
    assert torch.equal(again(some_ids()).logits, model(some_ids()).logits)


def test_decoding_with_a_cache_is_the_whole_pass(model: MixturaForCausalLM) -> None:
    ids = some_ids()
    cache = DynamicCache(config=model.config)
    parts = [
        model(ids[:, a:b], **with_cache(cache), use_cache=True).logits for a, b in ((0, 4), (4, 5), (5, 10))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 10


def test_beams_take_what_is_remembered_with_them(model: MixturaForCausalLM) -> None:
    ids = some_ids()
    how = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    kept, anew = (model.generate(ids, use_cache=use, **how) for use in (True, False))
    assert torch.equal(kept, anew)


def test_padding_and_other_rows_change_nothing(model: MixturaForCausalLM) -> None:
    ids = some_ids(1)
    padded = torch.cat(
        [torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1), some_ids(1, 13, seed=5)]
    )
    masks = (padded != 0).long()
    places = (masks.cumsum(-1) - 1).clamp(min=0)
    shifted = model(padded, attention_mask=masks, position_ids=places).logits
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
    for name, slope in kept[False].items():
        assert slope is not None, name
        torch.testing.assert_close(kept[True][name], slope)


def test_weights_have_the_models_deviation() -> None:
    made = tiny_model(attention=SPARSE, initializer_range=0.02).model.layers[0].self_attn
    for name in ("inwards", "outwards"):
        assert 0.017 < float(made.sparse.get_parameter(name).detach().std()) < 0.023
    first, second = (layer.self_attn.gate for layer in tiny_model(attention=SPARSE).model.layers)
    assert not torch.equal(first, second)


def test_who_is_in_which_head_is_returned() -> None:
    made = tiny_model(attention=[SPARSE, "grouped_query"]).train()
    (found,) = made.model(some_ids()).head_routings
    assert found.load.tolist() == [6, 6, 6, 6]  # of ten tokens three, in two rows


def test_heads_with_a_window_take_the_implementations_mask() -> None:
    ids = some_ids()
    made = [
        tiny_model(attention=ATTENTIONS["windows_in_turn"], attn_implementation=a) for a in ("sdpa", "eager")
    ]
    torch.testing.assert_close(made[0](ids).logits, made[1](ids).logits, rtol=1e-4, atol=1e-4)
    whole, narrow = (one(ids, output_attentions=True).attentions for one in (tiny_model(), made[1]))
    assert whole is not None
    assert (narrow[0].tril(-3) == 0).all()
    assert not (narrow[1].tril(-3) == 0).all()


@pytest.mark.parametrize(
    ("attention", "error", "says"),
    [
        ("sparse_head", UnknownNameError, "no attention named 'sparse_head'; did you mean 'sparse_heads'"),
        ({"name": "sparse_heads", "sparsty": 2}, SettingError, "did you mean 'sparsity'"),
        (["grouped_query"] * 3, SettingError, "its length must divide 2, got 3"),
        ([], SettingError, "its length must divide 2, got 0"),
        ([3, "grouped_query"], SettingError, "an attention is written as a name"),
        ({"name": "sparse_heads", "num_dense": 4}, SettingError, "num_dense of SparseHeads"),
    ],
)
def test_what_is_wrong_is_said(attention: Any, error: type[UserError], says: str) -> None:
    with pytest.raises(error, match=says) as refused:
        tiny_model(attention=attention)
    assert "\n" not in str(refused.value)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which SparseHeads does not say; choose the attention grouped_query"):
        tiny_model({"router": "attention_aware"}, attention="sparse_heads")
    with pytest.raises(UnsupportedModelError, match="attention sparse_heads"):
        export(tiny_model(query_key_norm="none", attention="sparse_heads"), tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="grouped_query, window 3"):
        export(
            tiny_model(query_key_norm="none", attention=ATTENTIONS["windows_in_turn"][:1]), tmp_path / "out"
        )
    with pytest.raises(
        UserError, match="SparseHeads with a window or with heads that are chosen cannot run in"
    ):
        tiny_model(attention="sparse_heads")(some_ids(), cu_seq_lens_q=torch.tensor([0, 10]))


def test_configurations_of_before_have_ordinary_attention() -> None:
    values = tiny_config().to_dict()
    del values["attention"]
    again = MixturaForCausalLM(tiny_config().from_dict(values)).eval()
    assert torch.equal(again(some_ids()).logits, tiny_model()(some_ids()).logits)
