"""Tiny models of several families with adapters in them, for tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from families import tiny_inputs, tiny_model
from peft import get_peft_model
from torch import Tensor

import mixtura

mixtura.register_backend()

# Experts gated, interleaved with biases, sigmoid with groups and shared experts, ungated in a hybrid,
# transposed, with a clamp.
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "aria", "mixtral")
SETTINGS: dict[str, dict[str, Any]] = {
    "expert_lora": {"rank": 2, "ranks": {"1": 4}},
    "esft": {"experts": [0, 3, 5]},
    "lora": {"rank": 2},
}


def plain(family: str, implementation: str = "mixtura", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model that runs its experts in some way."""
    model: Any = tiny_model(family, dtype=dtype)
    model.set_experts_implementation(implementation)
    return model


def dense() -> Any:
    """A tiny dense model."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def adapted(
    family: str, method: str, implementation: str = "mixtura", *, started: bool = True, **more: Any
) -> Any:
    """The model with an adapter of a method, which changes something where it is ``started``."""
    settings = SETTINGS.get(method, {}) | more.pop("settings", {})
    config = mixtura.AdapterConfig(
        method=method, settings=settings, experts_implementation=implementation, task_type="CAUSAL_LM", **more
    )
    model = get_peft_model(plain(family, implementation), config)
    if started:
        stir(model)
    return model.eval()


def stir(model: Any, seed: int = 0, scale: float = 0.1) -> None:
    """Give all that adapters have random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixtura_adapter" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)


def logits(model: Any, **changed: Tensor) -> Tensor:
    """What a model predicts of a fixed batch."""
    inputs = tiny_inputs(model if hasattr(model, "config") else model.model) | changed
    with torch.no_grad():
        made: Tensor = model(**inputs).logits
    return made


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of the loss on a fixed batch, by name."""
    ids = tiny_inputs(model)["input_ids"]
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(made: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest value."""
    return float((made - wanted).abs().max() / wanted.abs().max())
