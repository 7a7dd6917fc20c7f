"""Several adapters at once, switched off while merged, and names that mean nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapting.adapted_models import adapted, error, logits, plain, stir
from peft import get_peft_model

import mixtura
from mixtura.errors import SettingError, UserError


@pytest.mark.parametrize("method", ["lora", "expert_lora", "esft"])
def test_switched_off_while_merged_the_base_is_itself(method: str) -> None:
    model = adapted("qwen3_moe", method)
    wanted = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain("qwen3_moe")))
    assert torch.equal(logits(model), wanted)


def two(implementation: str, order: list[str]) -> Any:
    """A model with whole matrices of an adapter's own and thin factors beside them, both active."""
    model = adapted("qwen3_moe", "esft", implementation)
    config = mixtura.AdapterConfig(
        method="expert_lora", settings={"rank": 2}, experts_implementation=implementation
    )
    model.add_adapter("thin", config)
    stir(model, seed=5)
    model.base_model.set_adapter(order)
    return model.eval()


@pytest.mark.parametrize("order", [["default", "thin"], ["thin", "default"]])
def test_two_adapters_make_the_same_by_kernels_by_matrices_and_merged(order: list[str]) -> None:
    """Thin factors come on top of matrices of one's own, whichever was named first."""
    model = two("mixtura", order)
    wanted = logits(model)
    model.base_model.set_adapter("default")
    assert error(logits(model), wanted) > 1e-3
    model.base_model.set_adapter(order)
    assert error(logits(two("eager", order)), wanted) < 2e-5
    model.merge_adapter(order)
    assert error(logits(model), wanted) < 2e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)


def test_each_adapter_has_a_dropout_of_its_own() -> None:
    """One with nearly all features left out beside one that leaves none: the latter stays what it is."""
    made = []
    for dropout in (0.0, 0.99):
        model = adapted("qwen3_moe", "expert_lora", settings={"rank": 2, "ranks": {}})
        second = {"rank": 2, "dropout": dropout, "seed": 3}
        model.add_adapter("second", mixtura.AdapterConfig(method="expert_lora", settings=second))
        model.base_model.set_adapter(["default", "second"])
        made.append(logits(model.train()))
    # The second has learned nothing yet, so whatever it leaves out changes nothing.
    assert error(made[1], made[0]) < 2e-5


def test_dropout_is_refused_where_matrices_are_built() -> None:
    model = adapted("qwen3_moe", "expert_lora", "eager", settings={"rank": 2, "ranks": {}, "dropout": 0.5})
    logits(model.eval())
    with pytest.raises(UserError, match="cannot have dropout; run the experts by experts_implementation"):
        logits(model.train())


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("expert_lora", {"experts": {"99": [0]}}, "experts of ExpertLora name layer '99'; the model has lay"),
        ("esft", {"experts": {"layer1": [0]}}, "experts of Esft name layer 'layer1'; the model has layers 0"),
        ("expert_lora", {"ranks": {"9.0": 2}}, "ranks of ExpertLora name layer '9'; the model has layers 0"),
        ("expert_lora", {"ranks": {"99": 2}}, "ranks of ExpertLora name expert 99 in layer 0, which has"),
        ("expert_lora", {"ranks": {".1": 2}}, "ranks of ExpertLora name '.1'; write EXPERT or LAYER.EXPERT"),
        ("expert_lora", {"experts": []}, "names no expert of any layer"),
    ],
)
def test_names_of_nothing_are_refused(method: str, settings: dict[str, Any], says: str) -> None:
    config = mixtura.AdapterConfig(method=method, settings=settings)
    with pytest.raises(UserError, match=says):
        get_peft_model(plain("qwen3_moe"), config)


def test_a_rank_that_is_no_number_is_told_by_its_name() -> None:
    with pytest.raises(SettingError, match="ranks of ExpertLora name 'first'"):
        get_peft_model(
            plain("qwen3_moe"), mixtura.AdapterConfig(method="expert_lora", settings={"ranks": {"first": 2}})
        )


@pytest.mark.parametrize(
    "settings", [{"experts": []}, {"experts": {"1": [99]}}, {"ranks": {"1.0": 99}}, {"experts": {"9": [0]}}]
)
def test_a_model_that_an_adapter_does_not_fit_is_as_it_was(settings: dict[str, Any]) -> None:
    """Also where the first layers had it already, and beside an adapter that fits."""
    model = plain("qwen3_moe", "eager")
    before = [(name, type(module)) for name, module in model.named_modules()]
    config = mixtura.AdapterConfig(method="expert_lora", settings=settings)
    with pytest.raises(UserError):
        get_peft_model(model, config)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._experts_implementation == "eager"
    adapted_model = adapted("qwen3_moe", "expert_lora")
    wanted = logits(adapted_model)
    learned = [name for name, one in adapted_model.named_parameters() if one.requires_grad]
    with pytest.raises(UserError):
        adapted_model.add_adapter("second", config)
    assert torch.equal(logits(adapted_model), wanted)
    assert [name for name, one in adapted_model.named_parameters() if one.requires_grad] == learned
