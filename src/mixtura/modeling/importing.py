"""A trained model of an ordinary family as one of our own, whose parts can then be others.

Of the families that `mixtura.modeling.export` writes: Mixtral, Qwen3-MoE and OLMoE.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from mixtura.errors import UnsupportedModelError
from mixtura.methods.routers.top_k import TopK
from mixtura.modeling.causal import MixturaForCausalLM
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.export import COMMON

_RENAMED = {".mlp.gate.weight": ".mlp.router.weight", ".mlp.experts.": ".mlp.experts.bank."}
# What a model of our own has and an ordinary one has not: counts of steps and states of balancers.
_OWN = "model.balance."


def imported(model: PreTrainedModel) -> MixturaForCausalLM:
    """The same model as a `MixturaForCausalLM`, whose weights are the very tensors, not copies.

    Raises:
        UnsupportedModelError: it is of another family, or has parts that ours cannot have.
    """
    config = model.config
    known = FAMILIES.get(config.model_type)
    if known is None:
        raise UnsupportedModelError(
            f"models of the family {config.model_type} cannot become models of our own; of these they can: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    _refuse_others(config)
    fields = {name: getattr(config, name) for name in COMMON} | known(config)
    made: MixturaForCausalLM = MixturaForCausalLM(MixturaConfig(**fields, dtype=config.dtype)).eval()
    weights = {_renamed(name): tensor for name, tensor in model.state_dict().items()}
    found = made.load_state_dict(weights, strict=False, assign=True)
    lacking = [name for name in found.missing_keys if not name.startswith(_OWN)]
    if lacking or found.unexpected_keys:
        raise UnsupportedModelError(
            f"this {config.model_type} model has other weights than its family: lacking {lacking[:3]}, "
            f"besides {found.unexpected_keys[:3]}; use one of transformers' own"
        )
    made.tie_weights()
    if model.generation_config is not None:
        made.generation_config = model.generation_config
    return made


@torch.no_grad()
def rerouted(model: MixturaForCausalLM, choice: Mapping[str, Any]) -> MixturaForCausalLM:
    """The same weights under another router, which takes over the rows of the trained one.

    What the router has besides begins as in a new model.

    Raises:
        UnsupportedModelError: the model's router is not top_k, or layers have other ones.
        SettingError: the router does not go with the model.
    """
    described = copy.deepcopy(model.config.to_dict())
    by_layer = [one for one in model.config.layers or () if isinstance(one, Mapping) and "router" in one]
    if by_layer or not all(isinstance(block.router, TopK) for block in model.model.blocks):
        raise UnsupportedModelError(
            "only the router top_k, the same in all layers, is known well enough to be changed for another"
        )
    old = model.model.blocks[0].router
    assert isinstance(old, TopK)
    described["moe"]["router"] = {"renormalize": old.renormalize, **choice}
    made: MixturaForCausalLM = MixturaForCausalLM(MixturaConfig.from_dict(described)).eval()
    made.to(model.dtype)
    found = made.load_state_dict(model.state_dict(), strict=False, assign=True)
    unknown = [name for name in found.missing_keys if ".router." not in name and not name.startswith(_OWN)]
    assert not unknown, unknown
    made.tie_weights()
    made.generation_config = model.generation_config
    return made


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def _refuse_others(config: Any) -> None:
    """Refuse what would be computed otherwise here."""
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"experts of our own models are of silu where they are imported, not of {config.hidden_act}"
        )
    for name in ("clip_qkv", "use_sliding_window"):
        if getattr(config, name, None):
            raise UnsupportedModelError(f"a model with {name} cannot become one of our own")


def _plain(config: Any, *, d_expert: int, num_experts: int, renormalize: bool) -> dict[str, Any]:
    router = {"name": "top_k", "top_k": config.num_experts_per_tok, "renormalize": renormalize}
    return {"moe": {"router": router, "num_experts": num_experts, "d_expert": d_expert}}


def _mixtral(config: Any) -> dict[str, Any]:
    window = config.sliding_window
    attention = "grouped_query" if window is None else {"name": "grouped_query", "window": window}
    plain = _plain(
        config,
        d_expert=config.intermediate_size,
        num_experts=config.num_local_experts,
        renormalize=True,
    )
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    return plain | {"query_key_norm": "none", "head_dim": head_dim, "attention": attention}


def _qwen3(config: Any) -> dict[str, Any]:
    plain = _plain(
        config,
        d_expert=config.moe_intermediate_size,
        num_experts=config.num_experts,
        renormalize=config.norm_topk_prob,
    )
    dense = [
        layer in config.mlp_only_layers or bool((layer + 1) % config.decoder_sparse_step)
        for layer in range(config.num_hidden_layers)
    ]
    return plain | {
        "query_key_norm": "head",
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "intermediate_size": config.intermediate_size,
        "layers": ["dense" if one else None for one in dense],
    }


def _olmoe(config: Any) -> dict[str, Any]:
    plain = _plain(
        config,
        d_expert=config.intermediate_size,
        num_experts=config.num_experts,
        renormalize=config.norm_topk_prob,
    )
    return plain | {"query_key_norm": "full", "attention_bias": config.attention_bias}


FAMILIES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3,
}
