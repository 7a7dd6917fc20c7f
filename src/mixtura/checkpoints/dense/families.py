"""What dense families compute, in the terms in which they and MoE families can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from mixtura.errors import UnsupportedModelError, suggest

_NO_WINDOW: int | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a decoder computes beside its matrices; two models of equal traits compute alike.

    Attributes:
        query_key_norm: norms of queries and keys: none, over each head, or over their full width.
        norms: whether a block's norms stand before attention and feed-forward or after them.
        bias: of attention: none, of query, key and value, or of the output as well.
        window: tokens that attention looks back, in every layer; None for all.
        activation: of the feed-forward part, as transformers calls it.
        embedding_scale: what embeddings are multiplied with.
        norm_shift: what is added to the weights of norms before they multiply.
    """

    query_key_norm: Literal["none", "head", "full"] = "none"
    norms: Literal["before", "after"] = "before"
    bias: Literal["none", "qkv", "all"] = "none"
    window: int | None = _NO_WINDOW
    activation: str = "silu"
    embedding_scale: float = 1.0
    norm_shift: float = 0.0


@final
@dataclass(frozen=True, slots=True)
class DenseFamily:
    """How a family is read.

    ``traits`` are those of a config. ``fused`` says for a stored matrix which matrices follow each other in
    its rows, with the config's number of rows of each.
    """

    traits: Callable[[Any], Traits]
    fused: Mapping[str, Callable[[Any], tuple[tuple[str, int], ...]]]


def family_of(config: Any) -> DenseFamily:
    """The dense family of a config.

    Raises:
        UnsupportedModelError: it is not one of those that are read.
    """
    found = FAMILIES.get(config.model_type)
    if found is None:
        reason = _WHY_NOT.get(config.model_type)
        raise UnsupportedModelError(
            f"{config.model_type} models are not made into experts here"
            + (f": {reason}" if reason else f"; {suggest(str(config.model_type), FAMILIES)}")
        )
    return found


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _llama(config: Any) -> Traits:
    _refuse_mlp_bias(config)
    bias: Literal["none", "all"] = "all" if getattr(config, "attention_bias", False) else "none"
    return Traits(bias=bias, activation=config.hidden_act)


def _mistral(config: Any) -> Traits:
    return Traits(window=config.sliding_window, activation=config.hidden_act)


def _qwen2(config: Any) -> Traits:
    _refuse_mixed_windows(config)
    return Traits(bias="qkv", activation=config.hidden_act)


def _qwen3(config: Any) -> Traits:
    return replace(_llama(config), query_key_norm="head", **_no_windows(config))


def _olmo2(config: Any) -> Traits:
    return replace(_llama(config), query_key_norm="full", norms="after")


def _phi3(config: Any) -> Traits:
    return Traits(window=config.sliding_window, activation=config.hidden_act)


def _gemma(config: Any) -> Traits:
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError("this gemma model attends to later tokens, which no MoE family does")
    return replace(
        _llama(config),
        # The newer of two names for it, where a config has both.
        activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        embedding_scale=float(config.hidden_size) ** 0.5,
        norm_shift=1.0,
    )


def _no_windows(config: Any) -> dict[str, Any]:
    _refuse_mixed_windows(config)
    return {}


def _refuse_mixed_windows(config: Any) -> None:
    if getattr(config, "use_sliding_window", False):
        raise UnsupportedModelError(
            f"this {config.model_type} model has a sliding window in some layers (use_sliding_window), which "
            "no MoE family has in the same layers; give one without"
        )


def _refuse_mlp_bias(config: Any) -> None:
    if getattr(config, "mlp_bias", False):
        raise UnsupportedModelError(
            f"this {config.model_type} model has biases in its feed-forward parts (mlp_bias), which experts "
            "of no ordinary family have; give one without"
        )


def _query_key_value(config: Any) -> tuple[tuple[str, int], ...]:
    own = head_dim(config)
    keys = config.num_key_value_heads * own
    return (
        ("self_attn.q_proj", config.num_attention_heads * own),
        ("self_attn.k_proj", keys),
        ("self_attn.v_proj", keys),
    )


def _gate_up(config: Any) -> tuple[tuple[str, int], ...]:
    return (("mlp.gate_proj", config.intermediate_size), ("mlp.up_proj", config.intermediate_size))


_PHI3 = {"self_attn.qkv_proj": _query_key_value, "mlp.gate_up_proj": _gate_up}
FAMILIES: Mapping[str, DenseFamily] = {
    "llama": DenseFamily(_llama, {}),
    "mistral": DenseFamily(_mistral, {}),
    "qwen2": DenseFamily(_qwen2, {}),
    "qwen3": DenseFamily(_qwen3, {}),
    "olmo2": DenseFamily(_olmo2, {}),
    "gemma": DenseFamily(_gemma, {}),
    "phi3": DenseFamily(_phi3, _PHI3),
}
_WHY_NOT = {
    "gemma2": "its logits are capped and it has norms before and after each part, which no MoE family "
    "that transformers has shares; gemma (the first) can be taken",
    "gemma3_text": "its layers have windows of their own and norms before and after each part, which no MoE "
    "family shares; gemma (the first) can be taken",
    "gemma3": "its layers have windows of their own and norms before and after each part, which no MoE "
    "family shares; gemma (the first) can be taken",
    "olmo3": "some of its layers have a sliding window, which flex_olmo has not; olmo2 can be taken",
    "olmo": "its norms have no weights, which no MoE family shares; olmo2 can be taken",
    "phi": "its feed-forward part has biases and no gate; phi3 can be taken",
    "gpt2": "its feed-forward part has biases and no gate, which experts of ordinary families need",
}
