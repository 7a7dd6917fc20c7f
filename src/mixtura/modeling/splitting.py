"""Finer experts of trained ones: each cut into several narrower, of which a token takes as many more."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mixtura.errors import SettingError, UnsupportedModelError
from mixtura.methods.routers.top_k import TopK
from mixtura.modeling.causal import MixturaForCausalLM
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.factoring import remade, require_plain
from mixtura.modeling.layer import MoELayer
from mixtura.modeling.parts import bank_of


@torch.no_grad()
def split(model: MixturaForCausalLM, parts: int) -> MixturaForCausalLM:
    """The same function with every expert cut into ``parts`` of a share of its hidden features.

    An expert's parts have its row of the router, so that a token that took k experts takes the ``parts * k``
    parts of these. Each has a ``parts``-th of the expert's weight, and what it writes is as much larger.
    From there they can be trained apart (fine-grained experts, DeepSeekMoE).

    Raises:
        SettingError: ``parts`` does not divide the experts' width.
        UnsupportedModelError: experts are not plain gated ones of silu under the router top_k, or layers
            differ in them.
    """
    require_plain(model)
    if any(isinstance(one, dict) for one in model.config.layers or ()):
        raise UnsupportedModelError("experts are split where all layers of experts are described alike")
    for block in model.model.blocks:
        width = block.experts.shape.d_expert
        if not isinstance(block.router, TopK):
            raise UnsupportedModelError(
                f"experts under the router {type(block.router).__name__} cannot be split; it must be top_k, "
                "whose choice and weights are known"
            )
        if parts < 1 or width % parts:
            raise SettingError(f"parts must divide the experts' width, {width}, got {parts}")
    values = copy.deepcopy(model.config.to_dict())
    described = values["moe"]
    shape = model.model.blocks[0].experts.shape
    chosen = model.model.blocks[0].router
    assert isinstance(chosen, TopK)
    described["router"] = {
        "name": "top_k", "top_k": parts * chosen.top_k, "renormalize": chosen.renormalize
    }  # fmt: skip
    described |= {
        "num_experts": parts * shape.num_experts,
        "d_expert": shape.d_expert // parts,
        "granularity": 1,
    }
    replaced: dict[str, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        if not isinstance(layer.mlp, MoELayer):
            continue
        name, bank = f"model.layers.{number}.mlp", bank_of(layer.mlp)
        gate, up = bank.get_parameter("gate_up_proj").chunk(2, dim=1)
        halves = [half.unflatten(1, (parts, -1)).flatten(0, 1) for half in (gate, up)]
        down = bank.get_parameter("down_proj").unflatten(2, (parts, -1)).movedim(2, 1).flatten(0, 1)
        replaced |= {
            f"{name}.experts.bank.gate_up_proj": torch.cat(halves, dim=1),
            f"{name}.experts.bank.down_proj": (parts * down).contiguous(),
            f"{name}.router.weight": layer.mlp.router.get_parameter("weight").repeat_interleave(parts, dim=0),
        }
    return remade(model, MixturaConfig.from_dict(values), replaced)
