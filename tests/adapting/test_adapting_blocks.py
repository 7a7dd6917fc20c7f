"""Experts of a dense part, tokens that alone are changed, an adapter's own matrices, and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from adapting.adapted_models import adapted, dense, error, logits, stir
from families import tiny_inputs, tiny_model
from peft import get_peft_model

import mixtura
from mixtura.adapting import StepCallback
from mixtura.adapting.layers import AdapterLayer
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.types import Progress


def test_a_model_without_dense_parts_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no dense feed-forward part"):
        get_peft_model(tiny_model("qwen3_moe"), mixtura.AdapterConfig(method="mix_lora"))


@pytest.mark.parametrize("implementation", ["mixtura", "eager"])
def test_text_is_what_it_was_until_a_new_token_comes(implementation: str) -> None:
    model = adapted("qwen3_moe", "modality_lora", implementation, settings={"rank": 2, "first_token": 20})
    # By the kernels of training, which know of adapters.
    model.enable_input_require_grads()
    ids = tiny_inputs(model)["input_ids"].clone() % 20
    ids[:, 5] = 25
    first: list[torch.Tensor] = []
    layer = next(one for one in model.modules() if isinstance(one, AdapterLayer))
    layer.register_forward_hook(lambda *made: first.append(made[2]))
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    made = model(input_ids=ids).logits
    new = (ids == 25).reshape(-1)
    assert torch.equal(first[1][~new], first[0][~new])
    assert not torch.equal(first[1][new], first[0][new])
    # Behind the first layer an expert has other rows beside those of text, which may round them otherwise.
    assert error(made[:, :5], plain[:, :5]) < 1e-6
    assert error(made[:, 5:6], plain[:, 5:6]) > 1e-4


@pytest.mark.parametrize("implementation", ["mixtura", "eager"])
def test_a_token_of_two_stretches_meets_what_both_add(implementation: str) -> None:
    """Two adapters whose stretches overlap, beside each token's experts computed one by one."""
    stretches = {"default": (8, 19), "second": (15, 30)}
    settings = [{"rank": 2, "first_token": f, "last_token": t, "samples": 0} for f, t in stretches.values()]
    model = adapted("qwen3_moe", "modality_lora", implementation, settings=settings[0])
    more = {"method": "modality_lora", "settings": settings[1], "experts_implementation": implementation}
    model.add_adapter("second", mixtura.AdapterConfig(**more))
    stir(model, seed=7)
    model.base_model.set_adapter(["default", "second"])
    layer = next(one for one in model.modules() if isinstance(one, AdapterLayer))
    given: list[Any] = []
    layer.register_forward_hook(lambda _, args, made: given.append((*args, made)))
    ids = torch.tensor([[3, 9, 16, 18, 25, 31]])
    with torch.no_grad():
        model(input_ids=ids)
        x, chosen, weights, made = given[0]
        base: Any = layer.base_layer
        for row, token in enumerate(ids[0].tolist()):
            wanted = torch.zeros_like(x[row])
            for expert, weight in zip(chosen[row].tolist(), weights[row], strict=True):
                up, down = base.gate_up_proj[expert].clone(), base.down_proj[expert].clone()
                for name, (first, last) in stretches.items():
                    if first <= token <= last:
                        part = layer.adapter(name).get_parameter
                        up += 8.0 * part("up_b")[expert] @ part("up_a")[expert]
                        down += 8.0 * part("down_b")[expert] @ part("down_a")[expert]
                gate, beside = (up @ x[row]).chunk(2)
                wanted += weight * (down @ (torch.nn.functional.silu(gate) * beside))
            torch.testing.assert_close(made[row], wanted, rtol=1e-4, atol=1e-5)


def test_what_is_merged_stays_under_matrices_of_an_adapters_own() -> None:
    model = adapted("qwen3_moe", "expert_lora")
    model.add_adapter("own", mixtura.AdapterConfig(method="esft", settings={"experts": [0, 2]}))
    stir(model, seed=3)
    tuner = model.base_model
    tuner.set_adapter(["default", "own"])
    wanted = logits(model)
    model.merge_adapter(["default"])
    assert error(logits(model), wanted) < 2e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)


def test_steps_are_told_with_what_was_met() -> None:
    """Of all passes since the last step, padding left out, and once where layers are computed again."""
    model = adapted("qwen3_moe", "dr_lora", settings={"rank": 2}).train()
    layer = next(one for one in model.modules() if isinstance(one, AdapterLayer))
    told: list[Progress] = []
    object.__setattr__(layer.adapter("default"), "before_step", told.append)
    inputs = tiny_inputs(model)
    ids, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    weights = []
    experts: Any = layer.base_layer
    handle = layer.register_forward_pre_hook(lambda _, args: weights.append((args[1], args[2].detach())))
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    handle.remove()
    callback = StepCallback(model)
    state = transformers.TrainerState(global_step=4, max_steps=9)
    callback.on_pre_optimizer_step(None, state, None)
    wanted = torch.zeros(experts.num_experts, dtype=torch.float64)
    for chosen, given in weights:
        for token in mask.reshape(-1).nonzero()[:, 0]:
            for expert, weight in zip(chosen[token], given[token], strict=True):
                wanted[expert] += float(weight)
    (progress,) = told
    assert (progress.step, progress.num_steps, progress.num_tokens) == (4, 9, 2 * int(mask.sum()))
    torch.testing.assert_close(progress.loads, wanted)
    callback.on_pre_optimizer_step(None, state, None)
    assert told[1].loads is None


def test_a_model_without_adapters_has_no_steps_to_be_told_of() -> None:
    with pytest.raises(UserError, match="no adapter of mixtura"):
        StepCallback(dense())
