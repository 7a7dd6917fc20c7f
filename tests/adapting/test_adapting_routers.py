"""Routers trained as copies beside an adapter: saved, loaded, merged, and untouched where not asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapting.adapted_models import adapted, error, gradients, logits, plain
from peft import PeftModel

import mixtura
from mixtura.checkpoints.view import open_model
from mixtura.errors import SettingError, UserError


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_trained_routers_are_saved_loaded_and_merged(family: str, tmp_path: Path) -> None:
    model = adapted(family, "expert_lora", train_router=True)
    routers = [layer.router_name for layer in open_model(plain(family)).layers]
    trained = {n: p for n, p in model.named_parameters() if "modules_to_save" in n and p.requires_grad}
    assert {n.partition("base_model.model.")[2].partition(".modules_to_save")[0] for n in trained} == {
        *routers
    }
    before = logits(model)
    with torch.no_grad():
        for number, parameter in enumerate(trained.values()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    wanted = logits(model)
    assert error(wanted, before) > 1e-3
    found = gradients(model.train())
    assert {*trained} <= {*found}
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain(family), tmp_path).eval()
    assert torch.equal(logits(again), wanted)
    assert error(logits(again.merge_and_unload()), wanted) < 2e-5


def test_what_a_config_cannot_be_is_said() -> None:
    with pytest.raises(SettingError, match="has no setting 'rnk'; did you mean 'rank'"):
        mixtura.AdapterConfig(method="expert_lora", settings={"rnk": 2})
    with pytest.raises(SettingError, match="bias must be 'none'"):
        mixtura.AdapterConfig(bias="all")
    with pytest.raises(UserError, match="did you mean 'expert_lora'"):
        mixtura.AdapterConfig(method="expertlora")
