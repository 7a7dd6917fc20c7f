"""Experts modules of transformers, one for every layout there is, with weights that matter."""

from __future__ import annotations

import copy
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import mixtura

mixtura.register_backend()

_SIZES = {
    "hidden_size": 36,
    "intermediate_size": 18,
    "moe_intermediate_size": 18,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
}

# Layout -> family, experts class, config class, sizes of its own.
LAYOUTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "default": ("qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeConfig", {}),
    "gelu": ("mixtral", "MixtralExperts", "MixtralConfig", {"hidden_act": "gelu"}),
    "interleaved": ("gpt_oss", "GptOssExperts", "GptOssConfig", {"swiglu_limit": 1.5}),
    "transposed": ("aria", "AriaExperts", "AriaTextConfig", {}),
    "transposed_biased": (
        "openai_privacy_filter",
        "OpenAIPrivacyFilterExperts",
        "OpenAIPrivacyFilterConfig",
        {"swiglu_limit": 1.5},
    ),
    "ungated": ("nemotron_h", "NemotronHExperts", "NemotronHConfig", {"moe_latent_size": 20}),
    "post_norm": ("muse_spark", "MuseSparkExperts", "MuseSparkTextConfig", {"moe_hidden_size": 36}),
    "clamped": ("deepseek_v4", "DeepseekV4Experts", "DeepseekV4Config", {"swiglu_limit": 1.5}),
    "two_argument_gate": ("inkling2", "Inkling2Experts", "Inkling2TextConfig", {}),
}

# Those whose family the installed release has.
LAYOUTS = {name: one for name, one in LAYOUTS.items() if find_spec(f"transformers.models.{one[0]}")}

# What rounds to float32 on the way whatever it is given: the family's loop, its norm, its gate.
ROUNDED = ("transposed_biased", "post_norm", "two_argument_gate")


def experts_module(
    layout: str, dtype: torch.dtype = torch.float64, implementation: str = "mixtura", **sizes: Any
) -> nn.Module:
    """An experts module of the layout; the same weights for any dtype and implementation."""
    family, name, config_name, own = LAYOUTS[layout]
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    config_cls = getattr(transformers, config_name, None) or getattr(
        import_module(f"transformers.models.{family}.configuration_{family}"), config_name
    )
    known = set(config_cls.__dataclass_fields__)
    chosen = {key: value for key, value in {**_SIZES, **own, **sizes}.items() if key in known}
    config = config_cls(**chosen)
    config._experts_implementation = implementation
    module: nn.Module = getattr(modeling, name)(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values * (0.4 if parameter.ndim == 3 else 0.5)
    return module.to(dtype)


def with_implementation(module: nn.Module, implementation: str) -> nn.Module:
    """A copy of the module that runs by another implementation."""
    twin = copy.deepcopy(module)
    twin.config._experts_implementation = implementation
    return twin


def width_of(module: nn.Module) -> int:
    """D, the width of the module's tokens."""
    down = module.down_proj
    return int(down.shape[2] if module.is_transposed else down.shape[1])


def batch(
    module: nn.Module, num_tokens: int = 13, top_k: int = 3, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices (distinct for each token) and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width_of(module), generator=generator, dtype=torch.float64)
    scores = torch.rand(num_tokens, module.num_experts, generator=generator, dtype=torch.float64)
    weights, ids = scores.topk(top_k)
    return hidden.to(dtype), ids, weights.to(dtype)


def forward_and_gradients(
    module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Outputs and the gradient of everything, under a gradient of the outputs that has no symmetry."""
    module = copy.deepcopy(module)
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    outputs = module(hidden, ids, weights)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.dtype)
    outputs.backward(grad)
    found = {"outputs": outputs.detach(), "hidden": hidden.grad, "weights": weights.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}
    missing = [name for name, value in found.items() if value is None]
    assert not missing, f"no gradient for {missing}"
    return {name: value for name, value in found.items() if value is not None}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest error relative to the root mean square of the truth; 0 where both are all zeros."""
    value, truth = value.detach(), truth.detach()
    error = (value.double() - truth.double()).abs()
    scale = truth.double().pow(2).mean().sqrt()
    return float(error.max() / scale) if error.numel() and error.max() > 0 else 0.0


def norm_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the error relative to the norm of the truth."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())
