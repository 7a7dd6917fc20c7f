"""Write a model as one of an ordinary family, where its parts are that family's.

Four families are known: Mixtral, Qwen3-MoE, OLMoE (query and key normed over their full width) and
dots1 (DeepSeek-V3's routing on ordinary attention, with a shared expert).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mixtura.errors import OutputError, UnsupportedModelError
from mixtura.methods.experts.ffn import Ffn
from mixtura.modeling.causal import MixturaForCausalLM
from mixtura.modeling.decoder_layer import MixturaDecoderLayer
from mixtura.modeling.experts import Experts, SharedExpert
from mixtura.modeling.head import head_weight
from mixtura.modeling.parts import bank_of
from mixtura.modeling.plan import MoEPlan

COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rope_parameters", "rms_norm_eps", "initializer_range",
    "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
DEEPSEEK_ROUTER = "deepseek_v3"


@final
@dataclass(frozen=True, slots=True)
class Family:
    """An ordinary family: what it is called, its classes, and why a model is not one of it."""

    name: str
    config: Callable[[MixturaForCausalLM, MoEPlan], Any]
    model: type[Any]
    objections: Callable[[MixturaForCausalLM, MoEPlan], list[str]]


def export(model: MixturaForCausalLM, directory: str | Path) -> str:
    """Save a model in the format of an ordinary family, which gives the same logits there.

    Returns the family's ``model_type``. What only training needs (balancers, their losses) is left out.

    Raises:
        UnsupportedModelError: no family has all parts of the model, with the parts that differ.
        OutputError: the directory holds files.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists and is not empty; give a new directory")
    made = exported(model)
    made.save_pretrained(target)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(target)
    return str(made.config.model_type)


def exported(model: MixturaForCausalLM) -> Any:
    """The model as one of an ordinary family; its weights are shared, not copied, where they are the same.

    Raises:
        UnsupportedModelError: no family has all parts of the model, with the parts that differ.
    """
    plan = _common_plan(model)
    reasons = []
    for family in FAMILIES:
        found = family.objections(model, plan)
        if not found:
            return _filled(model, plan, family)
        reasons.append(f"{family.name} has {' and '.join(found)}")
    raise UnsupportedModelError(f"this model is of no ordinary family: {'; '.join(reasons)}")


def _common_plan(model: MixturaForCausalLM) -> MoEPlan:
    plans = {repr(plan): plan for plan in model.config.plans if plan is not None}
    if len(plans) != 1:
        raise UnsupportedModelError(
            f"an ordinary family has one kind of MoE layer, this model has {len(plans)}; use save_pretrained"
        )
    plan: MoEPlan = next(iter(plans.values()))
    if plan.router is None or plan.pool != 1 or plan.capacity is not None:
        raise UnsupportedModelError(
            "no ordinary family has mixers, common pools of experts or a capacity; use save_pretrained"
        )
    _require_plain(model, plan)
    if any(model.model.balance.of(place).ties is not None for place in range(len(model.model.blocks))):
        raise UnsupportedModelError(
            "no ordinary family weighs experts by their ties, as the balancer conflict_loss does with "
            "ties='topology'; use save_pretrained"
        )
    return plan


def _require_plain(model: MixturaForCausalLM, plan: MoEPlan) -> None:
    """Refuse layers of several passes, and experts and attentions that an ordinary family has not."""
    for attention in model.config.attentions:
        if attention.name != "grouped_query" or attention.settings.get("window") is not None:
            raise UnsupportedModelError(
                "ordinary families attend to all earlier tokens in all heads, not by the attention "
                f"{attention}; use save_pretrained"
            )
    if model.config.parallel:
        raise UnsupportedModelError(
            "no ordinary family has attention and experts side by side (parallel); use save_pretrained"
        )
    if plan.form is not None:
        raise UnsupportedModelError(
            f"no ordinary family has layers of the form {plan.form.name}; use save_pretrained"
        )
    bank = bank_of(model.model.blocks[0])
    if not isinstance(bank, Ffn) or bank.activation != "silu" or not bank.gated or bank.bias:
        raise UnsupportedModelError(
            f"ordinary families have gated experts of silu without biases, not {plan.experts}; use "
            "save_pretrained"
        )


def _filled(model: MixturaForCausalLM, plan: MoEPlan, family: Family) -> Any:
    config = family.config(model, plan)
    with torch.device("meta"):
        made = family.model(config)
    weights = dict(_renamed(model))
    wanted = set(made.state_dict())
    dtype = model.lm_head.weight.dtype
    made.load_state_dict({k: v for k, v in weights.items() if k in wanted}, strict=True, assign=True)
    made.tie_weights()
    made.config.dtype = dtype
    # What is not saved (frequencies of rotary positions) still has no values.
    for name, buffer in model.model.rotary_emb.named_buffers():
        setattr(made.model.rotary_emb, name, buffer)
    return made.eval()


def _renamed(model: MixturaForCausalLM) -> Any:
    """Names and tensors as the families call them."""
    place = 0
    yield "lm_head.weight", head_weight(model.lm_head)
    yield "model.embed_tokens.weight", model.model.embed_tokens.weight
    yield "model.norm.weight", model.model.norm.weight
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}"
        assert isinstance(layer, MixturaDecoderLayer)
        for name, tensor in layer.named_parameters():
            if not name.startswith("mlp.") or not hasattr(layer.mlp, "router"):
                yield f"{prefix}.{name}", tensor
        if hasattr(layer.mlp, "router"):
            for name, weight in _moe(layer, model.model.balance.of(place).bias).items():
                yield f"{prefix}.mlp.{name}", weight
            place += 1


def _moe(layer: MixturaDecoderLayer, bias: Tensor | None) -> dict[str, Tensor]:
    block: Any = layer.mlp
    assert isinstance(block.experts, Experts)
    weight: Tensor = block.router.weight
    found = {
        "gate.weight": weight,
        "gate.e_score_correction_bias": weight.new_zeros(weight.shape[0]) if bias is None else bias,
        "experts.gate_up_proj": block.experts.gate_up_proj,
        "experts.down_proj": block.experts.down_proj,
    }
    if isinstance(block.shared, SharedExpert):
        gate, up = block.shared.experts.gate_up_proj[0].chunk(2)
        down = block.shared.experts.down_proj[0]
        names = ("gate_proj", "up_proj", "down_proj")
        found |= {
            f"shared_experts.{n}.weight": t.contiguous() for n, t in zip(names, (gate, up, down), strict=True)
        }
    return found


def _common(model: MixturaForCausalLM, **own: Any) -> dict[str, Any]:
    kept = {name: getattr(model.config, name) for name in COMMON}
    # A head that is normed is a matrix of its own where it is written out.
    return kept | {"tie_word_embeddings": kept["tie_word_embeddings"] and not model.config.normed_head} | own


def _setting(model: MixturaForCausalLM, name: str) -> Any:
    return getattr(model.model.blocks[0].router, name)


def _mixtral(model: MixturaForCausalLM, plan: MoEPlan) -> Any:
    shape = model.model.blocks[0].experts.shape
    own = {"num_local_experts": shape.num_experts, "num_experts_per_tok": _setting(model, "top_k")}
    width, head = shape.d_expert, model.config.head_dim
    return MixtralConfig(**_common(model, **own, intermediate_size=width, head_dim=head, sliding_window=None))


def _dense_layers(model: MixturaForCausalLM) -> list[int]:
    return [number for number, plan in enumerate(model.config.plans) if plan is None]


def _qwen3(model: MixturaForCausalLM, plan: MoEPlan) -> Any:
    shape = model.model.blocks[0].experts.shape
    return Qwen3MoeConfig(
        **_common(
            model,
            head_dim=model.config.head_dim,
            attention_bias=model.config.attention_bias,
            num_experts=shape.num_experts,
            num_experts_per_tok=_setting(model, "top_k"),
            moe_intermediate_size=shape.d_expert,
            intermediate_size=model.config.intermediate_size,
            norm_topk_prob=_setting(model, "renormalize"),
            mlp_only_layers=_dense_layers(model),
        )
    )


def _olmoe(model: MixturaForCausalLM, plan: MoEPlan) -> Any:
    shape = model.model.blocks[0].experts.shape
    return OlmoeConfig(
        **_common(
            model,
            attention_bias=model.config.attention_bias,
            num_experts=shape.num_experts,
            num_experts_per_tok=_setting(model, "top_k"),
            intermediate_size=shape.d_expert,
            norm_topk_prob=_setting(model, "renormalize"),
        )
    )


def _is_top_k(plan: MoEPlan, *others: str) -> list[str]:
    assert plan.router is not None
    return [] if plan.router.name == "top_k" else [f"the router top_k, not {plan.router.name}"]


def _norm(model: MixturaForCausalLM, wanted: str) -> list[str]:
    found = model.config.query_key_norm
    return [] if found == wanted else [f"query_key_norm {wanted!r}, not {found!r}"]


def _no_shared(plan: MoEPlan) -> list[str]:
    return ["no shared expert"] if plan.shared_width else []


def _no_dense(model: MixturaForCausalLM) -> list[str]:
    return ["no dense layers"] if _dense_layers(model) else []


def _no_bias(model: MixturaForCausalLM) -> list[str]:
    layers = range(len(model.model.blocks))
    return (
        ["no bias in its choice"] if any(model.model.balance.of(n).bias is not None for n in layers) else []
    )


def _against_mixtral(model: MixturaForCausalLM, plan: MoEPlan) -> list[str]:
    found = _is_top_k(plan) + _norm(model, "none") + _no_shared(plan) + _no_dense(model) + _no_bias(model)
    if not found and not _setting(model, "renormalize"):
        found.append("weights that sum to one")
    return found + (["no bias in attention"] if model.config.attention_bias else [])


def _against_qwen3(model: MixturaForCausalLM, plan: MoEPlan) -> list[str]:
    return _is_top_k(plan) + _norm(model, "head") + _no_shared(plan) + _no_bias(model)


def _against_olmoe(model: MixturaForCausalLM, plan: MoEPlan) -> list[str]:
    found = _is_top_k(plan) + _norm(model, "full") + _no_shared(plan) + _no_dense(model) + _no_bias(model)
    config = model.config
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        found.append("heads that together are as wide as the model")
    return found


def _dots1(model: MixturaForCausalLM, plan: MoEPlan) -> Any:
    shape = model.model.blocks[0].experts.shape
    return Dots1Config(
        **_common(
            model,
            head_dim=model.config.head_dim,
            attention_bias=model.config.attention_bias,
            n_routed_experts=shape.num_experts,
            n_shared_experts=plan.shared_width // shape.d_expert,
            num_experts_per_tok=_setting(model, "top_k"),
            n_group=_setting(model, "num_groups"),
            topk_group=_setting(model, "top_groups"),
            norm_topk_prob=_setting(model, "renormalize"),
            routed_scaling_factor=_setting(model, "scaling"),
            moe_intermediate_size=shape.d_expert,
            intermediate_size=model.config.intermediate_size,
            first_k_dense_replace=len(_dense_layers(model)),
            sliding_window=None,
        )
    )


def _against_dots1(model: MixturaForCausalLM, plan: MoEPlan) -> list[str]:
    assert plan.router is not None
    found = _norm(model, "head")
    if plan.router.name != DEEPSEEK_ROUTER:
        found.append(f"the router {DEEPSEEK_ROUTER}, not {plan.router.name}")
    width = model.model.blocks[0].experts.shape.d_expert
    if not plan.shared_width or plan.shared_width % width or plan.shared_gated:
        found.append("a shared expert, not gated, as wide as some number of the others")
    dense = _dense_layers(model)
    if dense != list(range(len(dense))):
        found.append("dense layers at the start alone")
    return found


FAMILIES = (
    Family("Mixtral", _mixtral, MixtralForCausalLM, _against_mixtral),
    Family("Qwen3-MoE", _qwen3, Qwen3MoeForCausalLM, _against_qwen3),
    Family("OLMoE", _olmoe, OlmoeForCausalLM, _against_olmoe),
    Family("dots1", _dots1, Dots1ForCausalLM, _against_dots1),
)
