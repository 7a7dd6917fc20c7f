"""MoE families that an upcycled model can be: what each computes, its config, its tensors' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from mixtura.checkpoints.dense.families import Traits, head_dim
from mixtura.errors import UnknownNameError, UnsupportedModelError
from mixtura.types.upcycling import Become

Shared = Literal["none", "gated", "plain"]
# Models of mixtura's own: any router that there is.
OWN = "mixtura"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a family calls the tensors of an MoE layer; ``{e}`` stands for an expert's number.

    Where ``fused``, all experts lie in one tensor, gate above up; so do the two of a shared expert.
    """

    router: str
    gate: str
    up: str
    down: str
    fused: bool = False
    shared_gate: str = ""
    shared_up: str = ""
    shared_down: str = ""
    shared_switch: str = ""
    correction: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An MoE family.

    Attributes:
        query_key_norms: norms of queries and keys that it can have.
        norms: whether norms stand before or after a block.
        biases: of attention that it can have.
        windows: whether attention may look back so many tokens only, in every layer.
        scales: whether embeddings may be multiplied with a number.
        shared: how an expert that every token visits goes into the output.
        needs_shared: whether there must be one.
        config: the fields of its config that other families have not, or call otherwise.
    """

    model_type: str
    architecture: str
    query_key_norms: tuple[str, ...] = ("none",)
    norms: str = "before"
    biases: tuple[str, ...] = ("none",)
    windows: bool = False
    scales: bool = False
    shared: Shared = "none"
    needs_shared: bool = False
    names: Names
    config: Callable[[Any, Traits, Become], dict[str, Any]]

    def objections(self, traits: Traits, become: Become) -> list[str]:
        """What of a dense model, or of what is made of it, the family has not, in words."""
        found = []
        if traits.query_key_norm not in self.query_key_norms:
            found.append(_NORMS[traits.query_key_norm])
        if traits.norms != self.norms:
            found.append(f"norms {traits.norms} attention and experts")
        if traits.bias not in self.biases:
            found.append({"none": "attention without biases"}.get(traits.bias, "such biases in attention"))
        if traits.window is not None and not self.windows:
            found.append(f"a sliding window of {traits.window} tokens in every layer")
        if traits.embedding_scale != 1.0 and not self.scales:
            found.append("embeddings that are scaled")
        if self.model_type == OWN and traits.activation != "silu":
            found.append(f"experts of {traits.activation}")
        if self.model_type != OWN and become.settings:
            found.append("routers or layers of mixtura's own")
        if become.shared_width and self.shared == "none":
            found.append("an expert that every token visits")
        if not become.shared_width and self.needs_shared and self.shared == "plain":
            found.append("layers without an expert that every token visits")
        if self.model_type == "dots1" and become.shared_width % become.d_expert:
            found.append("a shared expert whose width is no multiple of the others'")
        return found


_NORMS = {
    "none": "queries and keys without norms",
    "head": "norms of queries and keys over each head",
    "full": "norms of queries and keys over their full width",
}
# Fields that all families call alike.
_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rope_parameters", "rms_norm_eps", "initializer_range", "tie_word_embeddings",
    "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout",
)  # fmt: skip
_PER_EXPERT = Names(
    router="mlp.gate.weight",
    gate="mlp.experts.{e}.gate_proj.weight",
    up="mlp.experts.{e}.up_proj.weight",
    down="mlp.experts.{e}.down_proj.weight",
)


def _mixtral(config: Any, traits: Traits, become: Become) -> dict[str, Any]:
    return {
        "num_local_experts": become.num_experts,
        "intermediate_size": become.d_expert,
        "sliding_window": traits.window,
    }


def _qwen2_moe(config: Any, traits: Traits, become: Become) -> dict[str, Any]:
    return {
        "num_experts": become.num_experts,
        "moe_intermediate_size": become.d_expert,
        "shared_expert_intermediate_size": become.shared_width,
        "intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
        "qkv_bias": traits.bias == "qkv",
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
    }


def _qwen3_moe(config: Any, traits: Traits, become: Become) -> dict[str, Any]:
    return {
        "num_experts": become.num_experts,
        "moe_intermediate_size": become.d_expert,
        "intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
        "attention_bias": traits.bias == "all",
        "decoder_sparse_step": 1,
    }


def _granite(config: Any, traits: Traits, become: Become) -> dict[str, Any]:
    return {
        "num_local_experts": become.num_experts,
        "intermediate_size": become.d_expert,
        "shared_intermediate_size": become.shared_width,
        "attention_bias": traits.bias == "all",
        "attention_multiplier": head_dim(config) ** -0.5,
        "embedding_multiplier": traits.embedding_scale,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
    }


def _dots1(config: Any, traits: Traits, become: Become) -> dict[str, Any]:
    return {
        "n_routed_experts": become.num_experts,
        "n_shared_experts": become.shared_width // become.d_expert,
        "moe_intermediate_size": become.d_expert,
        "intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "attention_bias": traits.bias == "all",
        "sliding_window": None,
    }


def _flex_olmo(config: Any, traits: Traits, become: Become) -> dict[str, Any]:
    return {
        "num_experts": become.num_experts,
        "intermediate_size": become.d_expert,
        "norm_topk_prob": True,
        "attention_bias": traits.bias == "all",
    }


def _own(config: Any, traits: Traits, become: Become) -> dict[str, Any]:
    router = {"name": "top_k", "top_k": become.top_k, "renormalize": True}
    window: Any = "grouped_query"
    if traits.window is not None:
        window = {"name": "grouped_query", "window": traits.window}
    common = {
        "router": router,
        "num_experts": become.num_experts,
        "d_expert": become.d_expert,
        "shared_width": become.shared_width,
    }
    settings = dict(become.settings)
    if "attention" in settings and traits.window is not None:
        settings["attention"] = {**settings["attention"], "window": traits.window}
    return {
        "intermediate_size": config.intermediate_size,
        "query_key_norm": traits.query_key_norm,
        "attention_bias": traits.bias == "all",
        "attention": window,
        **settings,
        "moe": {**common, **settings.get("moe", {})},
    }


# In the order in which they are chosen where nothing else is asked for.
TARGETS: Mapping[str, Target] = {
    "mixtral": Target(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        windows=True,
        names=Names(
            router="block_sparse_moe.gate.weight",
            gate="block_sparse_moe.experts.{e}.w1.weight",
            up="block_sparse_moe.experts.{e}.w3.weight",
            down="block_sparse_moe.experts.{e}.w2.weight",
        ),
        config=_mixtral,
    ),
    "qwen3_moe": Target(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        query_key_norms=("head",),
        biases=("none", "all"),
        names=_PER_EXPERT,
        config=_qwen3_moe,
    ),
    "flex_olmo": Target(
        model_type="flex_olmo",
        architecture="FlexOlmoForCausalLM",
        query_key_norms=("full",),
        norms="after",
        biases=("none", "all"),
        names=_PER_EXPERT,
        config=_flex_olmo,
    ),
    "granitemoeshared": Target(
        model_type="granitemoeshared",
        architecture="GraniteMoeSharedForCausalLM",
        biases=("none", "all"),
        scales=True,
        shared="plain",
        names=Names(
            router="block_sparse_moe.router.layer.weight",
            gate="block_sparse_moe.input_linear.weight",
            up="block_sparse_moe.input_linear.weight",
            down="block_sparse_moe.output_linear.weight",
            fused=True,
            shared_gate="shared_mlp.input_linear.weight",
            shared_up="shared_mlp.input_linear.weight",
            shared_down="shared_mlp.output_linear.weight",
        ),
        config=_granite,
    ),
    "qwen2_moe": Target(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        biases=("none", "qkv"),
        shared="gated",
        needs_shared=True,
        names=replace(
            _PER_EXPERT,
            shared_gate="mlp.shared_expert.gate_proj.weight",
            shared_up="mlp.shared_expert.up_proj.weight",
            shared_down="mlp.shared_expert.down_proj.weight",
            shared_switch="mlp.shared_expert_gate.weight",
        ),
        config=_qwen2_moe,
    ),
    "dots1": Target(
        model_type="dots1",
        architecture="Dots1ForCausalLM",
        query_key_norms=("head",),
        biases=("none", "all"),
        shared="plain",
        needs_shared=True,
        names=replace(
            _PER_EXPERT,
            shared_gate="mlp.shared_experts.gate_proj.weight",
            shared_up="mlp.shared_experts.up_proj.weight",
            shared_down="mlp.shared_experts.down_proj.weight",
            correction="mlp.gate.e_score_correction_bias",
        ),
        config=_dots1,
    ),
    OWN: Target(
        model_type=OWN,
        architecture="MixturaForCausalLM",
        query_key_norms=("none", "head", "full"),
        biases=("none", "all"),
        windows=True,
        shared="plain",
        names=Names(
            router="mlp.router.weight",
            gate="mlp.experts.bank.gate_up_proj",
            up="mlp.experts.bank.gate_up_proj",
            down="mlp.experts.bank.down_proj",
            fused=True,
            shared_gate="mlp.shared.experts.bank.gate_up_proj",
            shared_up="mlp.shared.experts.bank.gate_up_proj",
            shared_down="mlp.shared.experts.bank.down_proj",
        ),
        config=_own,
    ),
}


def choose_target(traits: Traits, become: Become, wanted: str | None) -> Target:
    """The family that holds what is to be made: the one that is wanted, else the first that can.

    A model of mixtura's own is made where it is asked for, or where the method makes what no other has.

    Raises:
        UnknownNameError: there is no such family.
        UnsupportedModelError: it cannot hold it, with what it lacks and which can; or none can.
    """
    if wanted is not None and wanted not in TARGETS:
        raise UnknownNameError("target family", wanted, TARGETS)
    can = [name for name, one in TARGETS.items() if not one.objections(traits, become)]
    own = bool(become.settings)
    if wanted is None and not own:
        can = [name for name in can if name != OWN]
    if wanted is not None and wanted not in can:
        missing = _listed(TARGETS[wanted].objections(traits, become))
        others = f"{_listed(can)} can" if can else "no family can"
        raise UnsupportedModelError(f"{wanted} cannot hold this model: it has not {missing}; {others}")
    if not can:
        known = [name for name in TARGETS if (name == OWN) == own]
        lacks = ((name, _listed(TARGETS[name].objections(traits, become))) for name in known)
        reasons = "; ".join(f"{name} has not {lacking}" for name, lacking in lacks)
        rescue = "" if own or TARGETS[OWN].objections(traits, become) else "; --target mixtura can"
        kind = "no MoE family" if own else "no ordinary MoE family"
        raise UnsupportedModelError(f"{kind} can hold this model: {reasons}{rescue}")
    return TARGETS[wanted or can[0]]


def config_of(target: Target, config: Any, traits: Traits, become: Become) -> Any:
    """The config of the result.

    Raises:
        UnsupportedModelError: rotary positions cover a part of each head only, which no target has.
    """
    from transformers import CONFIG_MAPPING

    # Makes models of mixtura's own known to transformers.
    import mixtura.modeling.family  # noqa: F401

    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"this {config.model_type} model rotates a part of each head only (partial_rotary_factor), which "
            "no MoE family here does"
        )
    common = {name: getattr(config, name) for name in _COMMON if getattr(config, name, None) is not None}
    if rope.get("rope_type") == "longrope":
        common["original_max_position_embeddings"] = config.original_max_position_embeddings
    own = target.config(config, traits, become)
    routed = {} if target.model_type == OWN else {"num_experts_per_tok": become.top_k, **become.settings}
    made = CONFIG_MAPPING[target.model_type](
        **{
            **common,
            "rope_parameters": rope,
            "head_dim": head_dim(config),
            "hidden_act": traits.activation,
            **own,
            **routed,
        }
    )
    made.architectures = [target.architecture]
    made.dtype = config.dtype
    return made


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
