"""Adapters in models of many layouts: start, merging, saving, gradients, implementations, PEFT's LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting.adapted_models import FAMILIES, adapted, error, gradients, logits, plain, stir
from peft import LoraConfig, PeftModel, get_peft_model

import mixtura
from mixtura.checkpoints.view import open_model

METHODS = ("expert_lora", "esft", "lora")
IMPLEMENTATIONS = ("mixtura", "eager", "grouped_mm")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_merges_saves_and_loads(family: str, method: str, implementation: str, tmp_path: Path) -> None:
    base = logits(plain(family, implementation))
    model = adapted(family, method, implementation, started=False)
    assert torch.equal(logits(model), base)
    stir(model)
    wanted = logits(model)
    assert error(wanted, base) > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(plain(family, implementation), tmp_path)), wanted)
    model.merge_adapter()
    assert error(logits(model), wanted) < 2e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert error(logits(model.merge_and_unload()), wanted) < 2e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_gradients_are_those_of_matrices_that_were_built(family: str, method: str) -> None:
    first = gradients(adapted(family, method, "mixtura").double().train())
    second = gradients(adapted(family, method, "eager").double().train())
    assert first.keys() == second.keys()
    for name, value in first.items():
        scale = float(value.abs().max()) + 1e-9
        assert float((value - second[name]).abs().max()) / scale < 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_experts_are_the_formula_written_out(family: str) -> None:
    """Each expert's matrix plus scale times b a, by a plain loop over experts."""
    before = {n: p.clone() for n, p in plain(family).named_parameters()}
    model = adapted(family, "expert_lora")
    adapters = {
        n.partition("base_model.model.")[2].removesuffix(".mixtura_adapter"): m["default"]
        for n, m in model.named_modules()
        if n.endswith(".mixtura_adapter")
    }
    merged = model.merge_and_unload()
    for layer in open_model(merged).layers:
        made: Any = adapters[layer.name]
        for name, parameter in zip(("up", "down"), layer.expert_parameters, strict=False):
            a, b = getattr(made, f"{name}_a"), getattr(made, f"{name}_b")
            for expert in range(layer.num_experts):
                rank = 4 if expert == 1 else 2
                delta = 16.0 / rank * (b[expert] @ a[expert])
                wanted = before[parameter][expert] + (delta.T if layer.layout.transposed else delta)
                torch.testing.assert_close(layer.tensor(parameter)[expert], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_are_pefts_lora_on_stacked_parameters(family: str) -> None:
    """PEFT keeps a's rows expert by expert and b's columns rank by rank."""
    ours = adapted(family, "expert_lora", settings={"rank": 2, "alpha": 4.0, "ranks": None})
    up = "gate_up_proj" if open_model(plain(family)).layers[0].layout.has_gate else "up_proj"
    theirs = get_peft_model(
        plain(family, "eager"),
        LoraConfig(
            r=2, lora_alpha=4, target_modules=[], target_parameters=[f"experts.{up}", "experts.down_proj"]
        ),
    )
    own = dict(ours.named_parameters())
    wrapped = {n: m for n, m in theirs.named_modules() if type(m).__name__ == "ParamWrapper"}
    assert wrapped
    with torch.no_grad():
        for name, module in wrapped.items():
            place = name.removesuffix(".base_layer")
            part = "down" if module.parameter_name == "down_proj" else "up"
            a = own[f"{place}.mixtura_adapter.default.{part}_a"]
            b = own[f"{place}.mixtura_adapter.default.{part}_b"]
            module.lora_A["default"].weight.copy_(a.reshape(-1, a.shape[2]))
            module.lora_B["default"].weight.copy_(b.permute(1, 2, 0).reshape(b.shape[1], -1))
    assert error(logits(ours), logits(theirs.eval())) < 2e-5


def test_tokens_that_meet_no_changed_expert_are_the_bases_to_the_bit() -> None:
    base = plain("qwen3_moe")
    seen: dict[str, torch.Tensor] = {}
    layer = open_model(base).layers[0]
    layer.experts.register_forward_pre_hook(lambda m, args: seen.update(x=args[0], ids=args[1], w=args[2]))
    logits(base)
    model = adapted("qwen3_moe", "expert_lora", settings={"experts": [3], "rank": 2, "ranks": None})
    inside = model.base_model.model.get_submodule(layer.name)
    # As they run in training: without gradients the compiled kernels run the base alone.
    given = seen["x"].requires_grad_(), seen["ids"], seen["w"]
    made, plainly = inside(*given), inside.base_layer(*given)
    met = (seen["ids"] == 3).any(1)
    assert 0 < met.sum() < len(met)
    assert torch.equal(made[~met], plainly[~met])
    assert (made[met] != plainly[met]).any(1).all()


def test_generation_uses_the_adapter() -> None:
    """Decoding token by token with a cache gives what a merged model gives."""
    model = adapted("qwen3_moe", "expert_lora")
    ids = torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    made = model.generate(input_ids=ids, **options)
    plainly = plain("qwen3_moe").generate(input_ids=ids, **options)
    merged = model.merge_and_unload().generate(input_ids=ids, **options)
    assert torch.equal(made, merged)
    assert not torch.equal(made, plainly)


def test_several_active_adapters_add_up() -> None:
    model = adapted("qwen3_moe", "expert_lora")
    model.add_adapter("second", mixtura.AdapterConfig(method="expert_lora", settings={"rank": 3, "seed": 5}))
    stir(model, seed=9)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    one = {name: (model.set_adapter(name), logits(model))[1] for name in ("default", "second")}
    assert min(error(both, value) for value in one.values()) > 1e-3
    model.base_model.set_adapter(["default", "second"])
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    assert error(logits(merged), both) < 2e-5
