"""What a model of mixtura's own has besides weights of dense models: routers, and balancers' states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mixtura.types.upcycling import Become

# Routers know the width of the tokens and the number of experts alone; all else can be as small as it gets.
_SMALL = {
    "vocab_size": 2, "intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 2,
    "attention": "grouped_query", "attention_bias": False, "query_key_norm": "none", "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False, "max_position_embeddings": 2,
    "rope_parameters": None,
}  # fmt: skip


def widths_of(become: Become, layer: int) -> tuple[int, int]:
    """The width of an expert of a layer, and of the one that every token visits."""
    layers = become.settings.get("layers") or [None] * (layer + 1)
    own = layers[layer] or {}
    return own.get("d_expert", become.d_expert), own.get("shared_width", become.shared_width)


def begun(config: Any) -> Mapping[str, Tensor]:
    """By name, what routers and balancers of a new model of this config hold; what is shared once.

    Raises:
        UserError: the config's methods do not go with each other or with its sizes.
    """
    from mixtura.modeling.family import MixturaConfig, MixturaForCausalLM

    fields = {
        name: getattr(config, name)
        for name in ("hidden_size", "num_hidden_layers", "rms_norm_eps", "initializer_range", "seed")
    }
    moe = {**config.moe, "d_expert": 1, "shared_width": 0}
    layers = [
        {**entry, "d_expert": 1, "shared_width": 0} if isinstance(entry, Mapping) else entry
        for entry in config.layers or [None] * config.num_hidden_layers
    ]
    model: Any = MixturaForCausalLM(MixturaConfig(**fields, **_SMALL, moe=moe, layers=layers))
    shared = model.model.get_expanded_tied_weights_keys()
    return {
        name: value
        for name, value in model.state_dict().items()
        if (".mlp.router." in name or ".balance." in name) and name.removeprefix("model.") not in shared
    }
