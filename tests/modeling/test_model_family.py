"""The model as transformers sees it: saving, loading, generating, what is shared, every router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.tiny_models import some_ids, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from mixtura.errors import SettingError, UnsupportedModelError, UserError
from mixtura.machine.releases import checkpoint_layers, with_cache
from mixtura.methods import header, names
from mixtura.modeling.family import MixturaConfig, MixturaForCausalLM, export

LABELS = {
    name: torch.zeros(2, dtype=torch.long)
    for name in ("domain", "language", "modality", "environment", "conditional")
}


def description(kind: str, name: str) -> dict[str, Any]:
    """An MoE layer with a method, and whatever else it asks for."""
    moe: dict[str, Any] = {kind: name, "router" if kind == "mixer" else "mixer": None}
    return moe | ({"pool": 2} if name == "rex_moe" else {})


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_again(tmp_path: Path, tied: bool) -> None:
    model = tiny_model({"balancers": ["loss_free"]}, tie_word_embeddings=tied, layers=["dense", None])
    with torch.no_grad():
        getattr(model.model.balance.of(0), "0_bias").copy_(torch.arange(4.0))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, MixturaForCausalLM)
    assert torch.equal(again(some_ids()).logits, model(some_ids()).logits)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_balancer_states_stay_exact_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_model({"balancers": ["loss_free"]})
    getattr(model.model.balance.of(1), "0_bias").fill_(1.001)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert again.model.balance.of(1).bias.tolist() == pytest.approx([1.001] * 4, rel=1e-6)
    assert torch.isfinite(again(some_ids()).logits).all()


def test_layers_share_pools_and_routers_after_loading_too(tmp_path: Path) -> None:
    model = tiny_model({"pool": 2, "router": "omni_router"})
    assert model.model.blocks[0].experts.shape.num_experts == 8
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    first, second = again.model.blocks
    assert first.router is second.router
    assert first.experts.members[1].gate_up_proj is second.experts.members[0].gate_up_proj
    assert torch.equal(again(some_ids()).logits, model(some_ids()).logits)


def test_weights_come_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, two, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    assert torch.equal(state, torch.get_rng_state())
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert all(not torch.equal(a, c) for a, _, c in pairs if a.ndim > 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("norm", ["none", "head", "full"])
def test_generating_equals_the_whole_pass(attention: str, norm: str) -> None:
    model = tiny_model(query_key_norm=norm)
    model.set_attn_implementation(attention)
    ids = some_ids()
    made = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(model(made).logits[:, 9:-1].argmax(-1), made[:, 10:])


def test_padding_on_the_left_changes_nothing() -> None:
    model = tiny_model({"router": "similarity_aware"})
    ids = some_ids(1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain, shifted = model(ids).logits, model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(shifted[:, 3:], plain)


@pytest.mark.parametrize("router", ["attention_aware", "similarity_aware"])
def test_history_lives_beside_the_cache(router: str) -> None:
    model = tiny_model({"router": router})
    ids = some_ids()
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    parts = [
        model(ids[:, a:b], **with_cache(cache), use_cache=True).logits for a, b in ((0, 4), (4, 5), (5, 10))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    beams = model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None)
    best = model(beams).logits[:, 9:-1].log_softmax(-1).gather(-1, beams[:, 10:, None]).sum((1, 2))
    greedy = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    plain = model(greedy).logits[:, 9:-1].log_softmax(-1).gather(-1, greedy[:, 10:, None]).sum((1, 2))
    assert (best >= plain - 1e-4).all()


def test_packed_documents_do_not_see_each_other() -> None:
    model = tiny_model({"router": "attention_aware"})
    ids = some_ids(1, 10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :4], model(ids[:, :4]).logits)
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", names("routers"))
def test_every_router_trains_and_evaluates(name: str) -> None:
    learn_and_evaluate(description("router", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", names("mixers"))
def test_every_mixer_trains_and_evaluates(name: str) -> None:
    learn_and_evaluate(description("mixer", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", names("balancers"))
def test_every_balancer_trains(name: str) -> None:
    made_for = [t.partition(":")[2] for t in header("balancers", name).tags if t.startswith("needs_router:")]
    learn_and_evaluate({"router": made_for[0] if made_for else "top_k", "balancers": [name]})


def learn_and_evaluate(moe: dict[str, Any]) -> None:
    """Two steps with accumulation, then an evaluation; every loss finite and the step counted."""
    model = tiny_model(moe | {"num_experts": 8}).train()
    ids = some_ids(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for _ in range(2):
            output = model(ids, labels=ids, token_labels=LABELS, output_routing=True)
            assert torch.isfinite(output.loss)
            torch.autograd.backward(output.loss)
        optimizer.step()
        model.end_step()
        optimizer.zero_grad()
    assert int(model.model.balance.step) == 2
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(ids, labels=ids, token_labels=LABELS).loss)


def test_router_logits_are_given_by_layer() -> None:
    output = tiny_model()(some_ids(), output_router_logits=True, output_hidden_states=True)
    assert [tuple(one.shape) for one in output.router_logits] == [(20, 4)] * 2
    assert len(output.hidden_states) == 3


@pytest.mark.parametrize("router", ["top_k", "attention_aware"])
def test_activation_checkpointing_gives_the_same_gradients(router: str) -> None:
    model = tiny_model({"router": router, "balancers": ["switch_loss"]}).train()
    ids = some_ids()
    torch.autograd.backward(model(ids, labels=ids).loss)
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.end_step()
    model.model.balance.step.zero_()
    checkpoint_layers(model)
    torch.autograd.backward(model(ids, labels=ids).loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


@pytest.mark.slow
def test_continuous_batching_equals_generate() -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = tiny_model()
    prompts = [some_ids(1, 7)[0].tolist(), some_ids(1, 5, seed=1)[0].tolist()]
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64)
    made = model.generate_batch(
        inputs=prompts, generation_config=settings, continuous_batching_config=room, progress_bar=False
    )
    for prompt, result in zip(prompts, made.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=settings)
        assert result.generated_tokens == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("moe", "says"),
    [
        ({"routr": "top_k"}, "did you mean 'router'"),
        ({"router": "topk"}, "did you mean 'top_k'"),
        ({"router": {"name": "top_k", "top": 2}}, "did you mean 'top_k'"),
        ({"router": {"name": "top_k", "top_k": 9}}, "must be in"),
        ({"router": "top_k", "mixer": "smear"}, "not both"),
        ({"num_experts": 0}, "must be in"),
        ({"capacity": {"factr": 1.0, "factor": 1.0}}, "did you mean 'factor'"),
        ({"balancers": ["switch_los"]}, "did you mean 'switch_loss'"),
        ({"router": "hash", "balancers": ["loss_free"]}, "reads no selection bias"),
        ({"pool": 3}, "does not divide"),
        ({"balancers": [{"name": "device_loss", "num_devices": 3}]}, "cannot be divided into 3 devices"),
        ({"balancers": [{"name": "moec", "num_clusters": 3}]}, "cannot be divided into 3 clusters"),
        ({"router": "pre_gated", "balancers": ["erc_loss"]}, "no matrix with a row for each"),
        ({"router": "yuan_attention", "balancers": ["erc_loss"]}, "no matrix with a row for each"),
        ({"router": None, "mixer": "soft_moe", "balancers": ["erc_loss"]}, "no matrix with a row for each"),
        ({"router": None, "mixer": "dense", "balancers": ["switch_loss"]}, "every expert every token"),
        ({"router": None, "mixer": "smear", "balancers": ["global_batch"]}, "every expert every token"),
        ({"router": None, "mixer": "dense", "balancers": ["conflict_loss"]}, "every expert every token"),
        ({"router": None, "mixer": "dense", "balancers": ["loss_free"]}, "reads no selection bias"),
        ({"router": "sinkhorn", "balancers": ["moec"]}, "does not read which experts are allowed"),
    ],
)
def test_what_is_wrong_is_said(moe: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        tiny_model(moe)


@pytest.mark.parametrize(
    "moe",
    [
        {"balancers": ["loss_free", "conflict_loss", "moec"]},
        {"router": "re_moe", "balancers": ["re_moe_l1"]},
        {"router": "x_moe"},
        {"router": None, "mixer": "smear"},
    ],
)
def test_what_a_checkpoint_lacks_is_drawn_by_the_seed(tmp_path: Path, moe: dict[str, Any]) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = tiny_config(moe)
    loaded, info = MixturaForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    drawn = MixturaForCausalLM(config)
    assert info["missing_keys"]
    for name in info["missing_keys"]:
        assert torch.equal(loaded.state_dict()[name], drawn.state_dict()[name]), name
    assert torch.isfinite(loaded(some_ids()).logits).all()


def test_ties_between_experts_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="weighs experts by their ties"):
        export(tiny_model({"balancers": ["conflict_loss"]}, query_key_norm="none"), tmp_path / "out")


def test_a_config_of_another_length_is_refused() -> None:
    with pytest.raises(SettingError, match="one entry for each of 2 layers"):
        tiny_config(layers=["dense"])
    with pytest.raises(SettingError, match="multiple"):
        MixturaConfig(num_attention_heads=4, num_key_value_heads=3)
