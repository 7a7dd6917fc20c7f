"""Layers of the arena whose experts or form are compared: as many multiplications a token as plain top-k."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mixtura.train.arena.scale import Scale

# Of the grid of experts that are made of two halves.
_ROWS = 16
# Of how many tokens a head chooses one.
_SPARSITY = 4


def _ungated(scale: Scale) -> int:
    """The width at which two matrices cost what three cost."""
    return round(1.5 * scale.d_expert)


def _latent(scale: Scale) -> dict[str, Any]:
    width = scale.hidden_size // 2
    left = 3 * scale.hidden_size * scale.d_expert * scale.top_k - 2 * width * scale.hidden_size
    d_expert = max(1, round(left / (scale.top_k * (2 * width + scale.hidden_size))))
    return {"experts": {"name": "latent", "width": width}, "d_expert": d_expert}


def _unequal(scale: Scale) -> dict[str, Any]:
    wide = round(1.6 * scale.d_expert)
    narrow = max(1, 2 * scale.d_expert - wide)
    return {"experts": {"name": "unequal", "widths": [wide, narrow]}, "d_expert": wide}


def _widening(scale: Scale) -> int:
    """How wide the adaptor of modulated experts is, after the experts and their common block."""
    matrices = 3 * scale.d_expert * scale.top_k / scale.hidden_size
    return max(1, round((matrices - 2 * scale.top_k - 2) / 2))


def _product(scale: Scale) -> dict[str, Any]:
    width = 2 * max(1, round(3 * scale.d_expert * scale.top_k / (4 * _ROWS)))
    return {
        "router": {"name": "monet", "num_heads": 2, "per_head": max(1, _ROWS // 4)},
        "experts": {"name": "product"},
        "num_experts": _ROWS * _ROWS,
        "d_expert": width,
    }


def _atomic(scale: Scale) -> dict[str, Any]:
    return {
        "router": {"name": "product_key", "top_k": round(1.5 * scale.d_expert * scale.top_k)},
        "experts": {"name": "atomic"},
        "num_experts": round(1.5 * scale.d_expert * scale.num_experts),
        "d_expert": 1,
    }


def _modulated(scale: Scale) -> dict[str, Any]:
    left = 3 * scale.d_expert * scale.top_k - 4 * scale.hidden_size
    d_expert = max(1, round(left / (3 * scale.top_k)))
    return {"form": {"name": "modulated", "widening": 1}, "d_expert": d_expert}


def _halved(name: str) -> Callable[[Scale], dict[str, Any]]:
    return lambda scale: {"form": {"name": name}, "d_expert": max(1, scale.d_expert // 2)}


def _beside(name: str) -> Callable[[Scale], dict[str, Any]]:
    """A dense part of an expert's width, and an expert fewer."""
    return lambda scale: {
        "form": {"name": name},
        "router": {"name": "top_k", "top_k": max(1, scale.top_k - 1)},
    }


def _heads(name: str, num_heads: int, **settings: Any) -> dict[str, Any]:
    """An attention with as many heads, each with keys and values of its own."""
    return {
        "attention": {"name": name, **settings},
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
    }


def _projections(scale: Scale) -> float:
    """What a token's projections cost in plain attention, in those of a head with keys of its own."""
    return (scale.num_attention_heads + scale.num_key_value_heads) / 2


def _sparse(scale: Scale) -> dict[str, Any]:
    """One ordinary head, and for the rest of the arithmetic heads that choose a quarter of the tokens."""
    num = max(1, round(_SPARSITY * (_projections(scale) - 1)))
    return _heads("sparse_heads", 1 + num, num_dense=1, sparsity=_SPARSITY)


def _selective(scale: Scale) -> dict[str, Any]:
    """Twice the heads that a token is in."""
    num = max(1, round(_projections(scale)))
    return _heads("selective_heads", 2 * num, top_heads=num)


# The fields of the model's configuration by attention.
ATTENTIONS: Mapping[str, Callable[[Scale], Mapping[str, Any]]] = {
    # Plain attention is every entry's; here every second layer sees the last quarter of a sequence alone.
    "grouped_query": lambda scale: {
        "attention": [
            {"name": "grouped_query", "window": max(1, scale.sequence_length // 4)},
            "grouped_query",
        ]
    },
    "sparse_heads": _sparse,
    "selective_heads": _selective,
}

LAYERS: Mapping[str, Callable[[Scale], Mapping[str, Any]]] = {
    "experts/ffn": lambda scale: {
        "experts": {"name": "ffn", "activation": "gelu", "gated": False},
        "d_expert": _ungated(scale),
    },
    "experts/latent": _latent,
    "experts/subspace": lambda scale: {"experts": {"name": "subspace"}, "d_expert": _ungated(scale)},
    "experts/conv": lambda scale: {"experts": {"name": "conv"}, "d_expert": _ungated(scale)},
    "experts/unequal": _unequal,
    "experts/feature_modulated": lambda scale: {
        "experts": {"name": "feature_modulated"},
        "form": {"name": "modulated", "widening": _widening(scale)},
    },
    "experts/product": _product,
    "experts/atomic": _atomic,
    "forms/chain": lambda scale: {
        "form": {"name": "chain", "iterations": 2},
        "router": {"name": "top_k", "top_k": max(1, scale.top_k // 2)},
    },
    "forms/stacked": _halved("stacked"),
    "forms/cartesian": _halved("cartesian"),
    "forms/residual_branch": _beside("residual_branch"),
    "forms/then_dense": _beside("then_dense"),
    "forms/modulated": _modulated,
}


def attention_of(name: str, scale: Scale) -> dict[str, Any]:
    """Fields of the configuration of a model with an attention; its defaults where it has no entry here."""
    own = ATTENTIONS.get(name)
    return {"attention": {"name": name}} if own is None else dict(own(scale))


def layer_of(kind: str, name: str, scale: Scale) -> dict[str, Any]:
    """The layer in which experts or a form take part; one that has no entry here, at the plain sizes."""
    plain: dict[str, Any] = {"router": {"name": "top_k", "top_k": scale.top_k}}
    own = LAYERS.get(f"{kind}/{name}")
    if own is not None:
        return plain | dict(own(scale))
    return plain | {"form" if kind == "forms" else kind: {"name": name}}
