"""LoRA experts that begin as LoRAs of PEFT's own type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting.adapted_models import dense, error, logits
from peft import LoraConfig, get_peft_model

import mixtura
from mixtura.adapting import start_from
from mixtura.errors import CheckpointError, UserError


def lora(folder: Path, seed: int, **more: Any) -> torch.Tensor:
    """Write a LoRA that changes something; what it predicts."""
    settings = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    } | more
    torch.manual_seed(seed)
    model = get_peft_model(dense(), LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return logits(model)


def rocket(count: int, method: str = "rocket", **settings: Any) -> Any:
    """A model whose LoRA experts are still nothing."""
    config = mixtura.AdapterConfig(
        method=method,
        settings={"num_experts": count, "rank": 4} | settings,
        target_modules=["q_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(dense(), config).eval()


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}])
def test_experts_that_are_all_one_lora_predict_what_peft_does_with_it(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    with torch.random.fork_rng():
        wanted = lora(tmp_path / "one", 1, **more)
    model = rocket(3)
    start_from(model, [tmp_path / "one"] * 3)
    assert error(logits(model), wanted) < 2e-5
    assert error(logits(dense()), wanted) > 1e-3


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        lora(tmp_path / "one", 1)
        lora(tmp_path / "else", 2, target_modules=["up_proj"])
        lora(tmp_path / "dora", 3, use_dora=True)
    with pytest.raises(UserError, match="set num_experts=2"):
        start_from(rocket(3), [tmp_path / "one"] * 2)
    with pytest.raises(UserError, match=r"LoRA on model\.layers.*up_proj"):
        start_from(rocket(1, top_k=1), [tmp_path / "else"])
    with pytest.raises(CheckpointError, match="use_dora"):
        start_from(rocket(1, top_k=1), [tmp_path / "dora"])
    with pytest.raises(CheckpointError, match="no LoRA that can be read"):
        start_from(rocket(1, top_k=1), [tmp_path / "nothing"])
    with pytest.raises(UserError, match="takes_library"):
        start_from(rocket(2, "moe_lora"), [tmp_path / "one"] * 2)
