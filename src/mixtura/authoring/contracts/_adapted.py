"""Small models of transformers with an adapter in them, as checks of adapters use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mixtura.authoring.contracts._core import Subject
from mixtura.types import MatrixShape, Site

_SEED = 3
_SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
_FAMILIES = ("qwen3_moe", "gpt_oss")


def families(method: Subject) -> tuple[str, ...]:
    """The small models that a method is tried on: with experts, or a dense one for methods of blocks."""
    return ("qwen3",) if method.has("changes:blocks") else _FAMILIES


def site(kind: str) -> Site:
    """A site by itself: a linear layer, a dense feed-forward part, or four experts."""
    if kind == "block":
        shapes = {"gate": MatrixShape(24, 32), "up": MatrixShape(24, 32), "down": MatrixShape(32, 24)}
        return Site(name="model.layers.1.mlp", kind="block", layer=1, num_layers=2, matrices=shapes)
    if kind == "linear":
        shapes = {"weight": MatrixShape(24, 32)}
        return Site(name="model.layers.1.q_proj", kind="linear", layer=1, num_layers=2, matrices=shapes)
    shapes = {"up": MatrixShape(48, 32), "down": MatrixShape(32, 24)}
    name = "model.layers.1.mlp.experts"
    return Site(name=name, kind="experts", layer=1, num_layers=2, matrices=shapes, num_experts=4)


def base(family: str, implementation: str = "mixtura") -> Any:
    """A small model with values that matter: gated experts, or transposed ones with biases."""
    import transformers

    from mixtura.kernels import register_backend

    register_backend()
    if family == "qwen3_moe":
        config: Any = transformers.Qwen3MoeConfig(**_SIZES, moe_intermediate_size=24, num_experts=4)
        cls = transformers.Qwen3MoeForCausalLM
    elif family == "qwen3":
        config = transformers.Qwen3Config(**{k: v for k, v in _SIZES.items() if "experts" not in k})
        cls = transformers.Qwen3ForCausalLM
        implementation = "eager"
    else:
        config = transformers.GptOssConfig(
            **_SIZES, num_local_experts=4, layer_types=["full_attention"] * 2, rope_parameters=None
        )
        cls = transformers.GptOssForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = cls._from_config(config, experts_implementation=implementation)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0.0, 0.2)
    return model.eval()


def adapted(
    method: Subject, family: str, implementation: str = "mixtura", *, started: bool = True, **settings: Any
) -> Any:
    """A model with the method's adapter: as it begins, or ``started`` with values drawn at random."""
    from peft import get_peft_model

    model = get_peft_model(base(family, implementation), config_of(method, implementation, **settings))
    if started:
        stir(model)
    return model.eval()


def config_of(method: Subject, implementation: str = "mixtura", **settings: Any) -> Any:
    """PEFT's config of the method's adapter."""
    from mixtura.adapting import AdapterConfig

    name = method.header.name if method.header.path.parent.name == "adapters" else str(method.header.path)
    return AdapterConfig(
        method=name, settings=settings, experts_implementation=implementation, task_type="CAUSAL_LM"
    )


def stir(model: Any, seed: int = 0) -> None:
    """Add random values to everything that adapters have, so that they change something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixtura_adapter" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.add_(drawn.to(parameter), alpha=0.1)


def batch(seed: int = 0, rows: int = 2, length: int = 9) -> Tensor:
    """Rows of token ids."""
    return torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a model predicts."""
    made: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask).logits
    return made


def gradients(model: Any, ids: Tensor, **more: Any) -> dict[str, Tensor]:
    """The gradients of a model's loss, by name, of what has one."""
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, use_cache=False, **more).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of tensors by name, relative to the largest value of each."""
    worst = 0.0
    for name, value in first.items():
        scale = float(value.abs().max()) + 1e-6
        worst = max(worst, float((value - second[name]).abs().max()) / scale)
    return worst


@contextmanager
def undisturbed() -> Iterator[None]:
    """A block after which PyTorch's global generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        yield
