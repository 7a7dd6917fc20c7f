"""What the adapter mix_lora promises beyond its kind's contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting.adapted_models import dense, logits, stir
from peft import PeftModel, get_peft_model

import mixtura
from mixtura.adapting.blocks import BlockLayer
from mixtura.adapting.layers import AdapterLayer
from mixtura.errors import UserError


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


CONFIGS: dict[str, dict[str, Any]] = {
    "mix_lora": {"rank": 2, "num_experts": 3, "alpha": 4.0},
    "lora": {"rank": 2, "alpha": 6.0},
}


def both(first: str) -> Any:
    """A dense model with plain LoRA and whole parts as experts, put on in either order, both active."""
    names = [first, *(name for name in CONFIGS if name != first)]
    configs = {name: mixtura.AdapterConfig(method=name, settings=CONFIGS[name]) for name in names}
    model = get_peft_model(dense(), configs[first], adapter_name=first)
    model.add_adapter(names[1], configs[names[1]])
    model = model.double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # The same values whichever was put on first.
        for _, one in sorted(adapters_of(model).items()):
            for parameter in one.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * noise)
    model.base_model.set_adapter(names)
    return model


def adapters_of(model: Any) -> dict[str, Any]:
    """Each adapter of each site, by both names."""
    layers = [one for one in model.modules() if isinstance(one, AdapterLayer)]
    return {
        f"{name} {layer.adapter(name).site.name}": layer.adapter(name)
        for layer in layers
        for name in layer.mixtura_adapter
    }


@pytest.mark.parametrize("first", ["lora", "mix_lora"])
def test_beside_plain_lora_experts_are_of_the_part_with_it(first: str) -> None:
    model = both(first)
    block = next(one for one in model.modules() if isinstance(one, BlockLayer))
    made, found, base = block.adapter("mix_lora"), adapters_of(model), dense().double().model.layers[0].mlp
    x = torch.randn(5, 16, dtype=torch.float64)
    matrices: dict[str, Any] = {}
    for n in ("gate", "up", "down"):
        plain = found[f"lora {made.site.name}.{n}_proj"]
        matrices[n] = getattr(base, f"{n}_proj").weight + 3.0 * plain.b[0] @ plain.a[0]
    with torch.no_grad():
        for row in x:
            wanted, chosen = torch.zeros(16, dtype=torch.float64), (made.router @ row).softmax(-1).topk(2)
            for share, e in zip(chosen.values / chosen.values.sum(), chosen.indices, strict=True):
                gate, up, down = (
                    matrices[n] + 2.0 * made.get_parameter(f"{n}_b")[e] @ made.get_parameter(f"{n}_a")[e]
                    for n in ("gate", "up", "down")
                )
                wanted += share * (down @ (torch.nn.functional.silu(gate @ row) * (up @ row)))
            torch.testing.assert_close(block(row[None])[0], wanted, rtol=1e-9, atol=1e-11)


def test_the_order_in_which_they_are_put_on_is_none_of_a_saved_adapters(tmp_path: Path) -> None:
    models = {name: both(name) for name in CONFIGS}
    wanted = logits(models["lora"])
    assert not torch.allclose(wanted, logits(dense().double()))
    torch.testing.assert_close(logits(models["mix_lora"]), wanted)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    for name in CONFIGS:
        model.base_model.set_adapter([name])
        alone = PeftModel.from_pretrained(dense(), tmp_path / "mix_lora" / name).double().eval()
        torch.testing.assert_close(logits(alone), logits(model), rtol=1e-6, atol=1e-6)
    for order in (list(CONFIGS), list(CONFIGS)[::-1]):
        again = PeftModel.from_pretrained(dense(), tmp_path / "lora" / order[0], adapter_name=order[0])
        again.load_adapter(tmp_path / "mix_lora" / order[1], adapter_name=order[1])
        again.base_model.set_adapter(order)
        torch.testing.assert_close(logits(again.double().eval()), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", ["lora", "mix_lora"])
def test_taken_out_of_one_another_both_leave_the_base_or_what_is_merged(first: str) -> None:
    model = both(first)
    model.base_model.set_adapter(["lora"])
    wanted = logits(model)
    assert torch.equal(logits(both(first).unload()), logits(dense().double()))
    merged = model.merge_and_unload(adapter_names=["lora"])
    assert not any(isinstance(one, AdapterLayer) for one in merged.modules())
    torch.testing.assert_close(logits(merged), wanted)


def test_refused_beside_another_it_leaves_that_one_alone() -> None:
    model = get_peft_model(dense(), mixtura.AdapterConfig(method="mix_lora", settings=CONFIGS["mix_lora"]))
    before = [(name, type(one)) for name, one in model.named_modules()]
    with pytest.raises(UserError):
        model.add_adapter("wide", mixtura.AdapterConfig(method="lora", settings={"rank": 99}))
    assert [(name, type(one)) for name, one in model.named_modules()] == before
