"""Small models and batches that the tests of rerouting share."""

from __future__ import annotations

from typing import Any

import torch
from families import tiny_model
from torch import Tensor

from mixtura.checkpoints.view import open_model

PAD = 0


def model_of(family: str, seed: int = 0) -> Any:
    """A tiny model of the family, in evaluation mode."""
    return tiny_model(family, seed)


# Where PEFT puts adapters: beside attention, on the experts' stacked matrices, on the router's, or a trained
# copy of the router.
ADAPTED: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "router": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    "router's copy": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


def with_adapters(model: Any, where: str = "attention", seed: int = 0, *, started: bool = True) -> Any:
    """The model wrapped by PEFT; its adapters change nothing yet unless ``started``."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        init_lora_weights=not started,
        **ADAPTED[where],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def texts(rows: int = 3, length: int = 10, seed: int = 0) -> Tensor:
    """Rows of token ids."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, widths: list[int]) -> dict[str, Tensor]:
    """The last tokens of each row, so many of each, padded on the left."""
    columns = ids.shape[1]
    mask = torch.stack([torch.arange(columns) >= columns - width for width in widths])
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch to train on, without loss on padding."""
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def gates(model: Any) -> list[Any]:
    """The router modules, by layer."""
    return [layer.router for layer in open_model(model).layers]


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the model predicts."""
    with torch.no_grad():
        made: Tensor = model(**batch).logits
    return made


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of all parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """The same tensors by name, up to rounding."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        scale = float(value.detach().abs().max()) + 1e-8
        assert float((value - second[name]).abs().max()) <= tolerance * scale + 1e-7, name
