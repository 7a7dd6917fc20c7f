"""Other routers in ordinary transformers models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_inputs
from rerouted import assert_alike, gates, gradients, left_padded, logits_of, model_of, texts, with_labels
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import mixtura
from mixtura.errors import CheckpointError, SettingError, UnknownNameError, UnsupportedModelError, UserError
from mixtura.machine.releases import checkpoint_layers
from mixtura.modeling.family import MixturaConfig, MixturaForCausalLM
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import RouterInput

# Families whose own rule is that of one of our routers, with its settings taken from the model.
SAME_RULE = {
    "mixtral": "top_k",
    "gpt_oss": "top_k",
    "gemma4": "top_k",
    "granitemoe": "top_k",
    "deepseek_v3": "deepseek_v3",
    "glm4_moe": "deepseek_v3",
    "dots1": "deepseek_v3",
}


@pytest.mark.parametrize(("family", "router"), SAME_RULE.items())
def test_the_same_rule_on_the_models_own_weights_changes_nothing(family: str, router: str) -> None:
    model = model_of(family)
    batch = {"input_ids": texts()}
    before = logits_of(model, batch)
    mixtura.set_router(model, router)
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-4)
    mixtura.restore(model)
    assert torch.equal(logits_of(model, batch), before)


def test_dynamic_top_p_gives_each_token_the_experts_it_needs() -> None:
    model = model_of("qwen3_moe")
    block = model.model.layers[1].mlp
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
    mixtura.set_router(model, "top_p", p=0.6)
    with torch.no_grad():
        made = block(x)[0]
        expected = torch.zeros(7, 32)
        numbers = set()
        for token, row in enumerate((x[0] @ block.gate.weight.T).softmax(-1)):
            mass, used = 0.0, 0
            for expert in row.argsort(descending=True).tolist():
                if mass >= 0.6:
                    break
                gate, up = (x[0, token] @ block.experts.gate_up_proj[expert].T).chunk(2)
                expected[token] += row[expert] * ((F.silu(gate) * up) @ block.experts.down_proj[expert].T)
                mass, used = mass + float(row[expert]), used + 1
            numbers.add(used)
    assert len(numbers) > 1
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "router", ["ada_moe", "moe_plus_plus", "expert_choice", "x_moe", "autonomy_of_experts"]
)
def test_a_layer_gives_what_one_of_our_own_gives_with_the_same_weights(router: str) -> None:
    model = model_of("qwen3_moe")
    block = model.model.layers[0].mlp
    rerouting = mixtura.set_router(model, router, train=True)
    shape = rerouting.seats[0].layer.shape
    chosen = mixtura.load_method("routers", router).settings_for(2, shape, {})
    own = mixtura.create("routers", router, shape, **chosen)
    experts = Experts(shape)
    with torch.no_grad():
        experts.gate_up_proj.copy_(block.experts.gate_up_proj)
        experts.down_proj.copy_(block.experts.down_proj)
        for name, parameter in own.named_parameters():
            held = block.gate.weight if name == "weight" else block.gate.mixtura_router.get_parameter(name)
            parameter.copy_(held)
        x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
        expected, _ = MoELayer(own, experts)(RouterInput.of(x[0]))
        torch.testing.assert_close(block(x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", mixtura.names("routers"))
def test_every_router_trains_in_a_model_or_says_why_not(router: str) -> None:
    model = model_of("qwen3_moe").train()
    batch = with_labels(left_padded(texts(4, 10), [10, 7, 9, 4]))
    refused = {"attention", "labels", "history"} & {
        tag.removeprefix("reads:") for tag in mixtura.header("routers", router).tags
    }
    if refused or {"two_passes", "axes", "modulates"} & set(mixtura.header("routers", router).tags):
        with pytest.raises(UserError, match=r"reads|two passes|grid of experts|what experts read"):
            mixtura.set_router(model, router, train=True)
        return
    mixtura.set_router(model, router, train=True)
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    assert all(slope.isfinite().all() for slope in gradients(model).values())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_restore_leaves_no_trace(family: str) -> None:
    model, untouched = model_of(family), model_of(family)
    mixtura.set_router(model, "ada_moe", num_null=4)
    mixtura.balance(model, "switch_loss")
    mixtura.restore(model)
    mixtura.restore(model)
    for (name, module), (_, other) in zip(model.named_modules(), untouched.named_modules(), strict=True):
        assert vars(module).keys() == vars(other).keys(), name
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            assert not getattr(module, hooks), name
    state, own = model.state_dict(), untouched.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], value) for name, value in own.items())
    assert model.config._experts_implementation == untouched.config._experts_implementation


def test_router_logits_are_still_recorded() -> None:
    model = model_of("mixtral")
    batch = {"input_ids": texts()}
    own = model(**batch, output_router_logits=True)
    mixtura.set_router(model, "top_p", p=0.5)
    swapped = model(**batch, output_router_logits=True)
    assert [layer.shape for layer in swapped.router_logits] == [layer.shape for layer in own.router_logits]
    torch.testing.assert_close(swapped.router_logits[0], own.router_logits[0])
    assert swapped.aux_loss.isfinite()


@pytest.mark.parametrize("router", ["top_p", "ada_moe", "expert_choice"])
def test_generating_with_a_cache_gives_what_whole_texts_give(router: str) -> None:
    model = model_of("qwen3_moe")
    mixtura.set_router(model, router)
    batch = left_padded(texts(2, 6), [6, 4])
    made = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(4):
        best = logits_of(model, {"input_ids": ids, "attention_mask": mask})[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
    assert torch.equal(made, ids)


def test_a_router_that_needs_later_tokens_is_refused_while_decoding() -> None:
    model = model_of("qwen3_moe")
    mixtura.set_router(model, "p_moe", train=True)
    assert logits_of(model, {"input_ids": texts()}).isfinite().all()
    with pytest.raises(UserError, match="cannot generate text"):
        model.generate(texts(1, 4), max_new_tokens=3, do_sample=False)


def test_the_checkpoint_stays_ordinary_and_the_router_is_beside_it(tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    model.save_pretrained(tmp_path / "own")
    mixtura.set_router(model, "ada_moe", num_null=3, num_choices=4)
    batch = {"input_ids": texts()}
    with torch.no_grad():
        for gate in gates(model):
            gate.mixtura_router.null.normal_(generator=torch.Generator().manual_seed(5))
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path / "swapped")
    names = {path.name for path in (tmp_path / "swapped").iterdir()}
    assert names - {path.name for path in (tmp_path / "own").iterdir()} == {
        "router.json",
        "router.safetensors",
    }
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "swapped" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "swapped").eval()
    mixtura.restore(model)
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(model, batch), rtol=1e-4, atol=1e-4)
    mixtura.load_router(loaded, tmp_path / "swapped")
    torch.testing.assert_close(logits_of(loaded, batch), expected)
    whole = mixtura.load(tmp_path / "swapped")
    torch.testing.assert_close(logits_of(whole, batch), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"has no router\.json"):
        mixtura.load_router(loaded, tmp_path / "own")
    (tmp_path / "swapped" / "router.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"router\.safetensors cannot be read"):
        mixtura.load_router(loaded, tmp_path / "swapped")


def test_training_trains_the_models_own_rows_and_the_routers_extra_ones() -> None:
    model = model_of("qwen3_moe").train()
    rerouting = mixtura.set_router(model, "ada_moe", num_null=4)
    batch = {"input_ids": texts(), "labels": texts()}
    output = model(**batch)
    plain = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    # The router's own balance loss of each layer is part of the model's loss.
    assert rerouting.loss is not None
    assert rerouting.loss.item() > 0.02
    torch.testing.assert_close(output.loss, plain + rerouting.loss)
    output.loss.backward()
    for gate in gates(model):
        assert gate.weight.grad.abs().sum() > 0
        assert gate.mixtura_router.null.grad.abs().sum() > 0
    names = {name for name, _ in model.named_parameters()}
    assert not any(name.endswith("mixtura_router.weight") for name in names)


def test_a_router_without_trained_weights_must_be_trained_and_then_learns() -> None:
    model = model_of("mixtral")
    with pytest.raises(UserError, match=r"XMoe cannot start from the model's router weights.*train=True"):
        mixtura.set_router(model, "x_moe")
    mixtura.set_router(model, "x_moe", train=True)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(input_ids=texts(), labels=texts()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("routers", [("r_moe", True), ("noisy_top_k", False)])
def test_activation_checkpointing_changes_no_gradient(routers: tuple[str, bool]) -> None:
    # One hands a state from layer to layer, the other draws noise in training.
    name, train = routers
    found = []
    for checkpointing in (False, True):
        model = model_of("qwen3_moe").train()
        mixtura.set_router(model, name, train=train)
        if checkpointing:
            checkpoint_layers(model, use_reentrant=False)
        # Two passes before either goes backward: layers computed again must find their own pass.
        first = model(input_ids=texts(seed=1), labels=texts(seed=1), use_cache=False).loss
        second = model(input_ids=texts(2, 6, seed=2), labels=texts(2, 6, seed=2), use_cache=False).loss
        (first + 2 * second).backward()
        found.append(gradients(model))
    assert_alike(*found)


def test_padding_changes_nothing() -> None:
    model = model_of("qwen3_moe")
    mixtura.set_router(model, "gshard")
    ids = texts(1, 6)
    alone = logits_of(model, {"input_ids": ids})
    batch = {
        "input_ids": F.pad(ids, (5, 0)),
        "attention_mask": F.pad(torch.ones_like(ids), (5, 0)),
    }
    torch.testing.assert_close(logits_of(model, batch)[:, 5:], alone, rtol=1e-4, atol=1e-4)


def test_a_copy_of_the_model_is_its_own() -> None:
    model = model_of("qwen3_moe")
    mixtura.set_router(model, "top_p", p=0.5)
    batch = {"input_ids": texts()}
    expected = logits_of(model, batch)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for gate in gates(model):
            gate.weight.zero_()
    assert torch.equal(logits_of(copied, batch), expected)
    mixtura.restore(copied)
    assert not torch.equal(logits_of(copied, batch), expected)


def test_only_the_layers_asked_for_are_changed() -> None:
    model = model_of("qwen3_moe")
    mixtura.set_router(model, "top_p", layers=[1])
    assert [hasattr(gate, "mixtura_router") for gate in gates(model)] == [False, True, False]
    with pytest.raises(UserError, match="layer 7 has no experts; the layers with experts are 0, 1, 2"):
        mixtura.set_router(model, "top_p", layers=[7])


@pytest.mark.parametrize(
    ("router", "settings", "error", "message"),
    [
        ("top_q", {}, UnknownNameError, "did you mean"),
        ("top_p", {"q": 1}, SettingError, "TopP has no setting 'q'"),
        ("top_k", {"top_k": 99}, SettingError, r"top_k of TopK must be in \[1, 8\], got 99"),
        ("attention_aware", {}, UserError, "reads attention"),
        ("lr_moe", {"train": True}, UserError, "reads labels"),
        ("thor", {"train": True}, UserError, "two passes"),
    ],
)
def test_what_cannot_be_done_is_said(router: str, settings: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        mixtura.set_router(model_of("mixtral"), router, **settings)


def test_a_dense_model_is_refused() -> None:
    config = Qwen3Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="dense"):
        mixtura.set_router(Qwen3ForCausalLM(config), "top_p")


def test_a_model_of_our_own_has_its_routers_in_its_config() -> None:
    with pytest.raises(UserError, match="part of its config"):
        mixtura.set_router(MixturaForCausalLM(MixturaConfig(vocab_size=16)), "top_p")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_a_router_and_gives_it_back(family: str) -> None:
    model = model_of(family)

    def run() -> torch.Tensor:
        # diffusion_gemma draws a random canvas when it is given none.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            output = model(**tiny_inputs(model))
        found: torch.Tensor = output.logits if getattr(output, "logits", None) is not None else output[0]
        return found

    before = run()
    mixtura.set_router(model, "top_p", p=0.5)
    swapped = run()
    assert swapped.isfinite().all()
    assert not torch.equal(swapped, before)
    mixtura.restore(model)
    assert torch.equal(run(), before)
