"""Latent experts of trained ones: each group's reading matrices through one narrow space that suits all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError, UnsupportedModelError
from mixtura.methods.experts.ffn import Ffn
from mixtura.modeling.causal import MixturaForCausalLM
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.layer import MoELayer
from mixtura.modeling.parts import bank_of

_BANK = ".mlp.experts.bank."


@final
@dataclass(frozen=True, slots=True)
class Factored:
    """A model whose experts are latent, and by MoE layer the share of its reading matrices that was lost.

    ``lost`` is the root of the squared error of gates and ups over their squares.
    """

    model: MixturaForCausalLM
    lost: tuple[float, ...]


@torch.no_grad()
def factored(model: MixturaForCausalLM, *, width: int, num_groups: int = 1) -> Factored:
    """The model with the experts `latent`: of all such factors those with the least squared error.

    In each group the experts' gates, stacked, are projected on their ``width`` strongest directions of the
    token, and so are what they multiply; writing matrices and all else stay the very tensors.

    Raises:
        SettingError: ``width`` is more than the model's, or groups do not divide the experts.
        UnsupportedModelError: experts are not plain gated ones of silu, or layers differ in them.
    """
    require_plain(model)
    values = copy.deepcopy(model.config.to_dict())
    values["moe"]["experts"] = {"name": "latent", "width": width, "num_groups": num_groups}
    if not 1 <= width <= model.config.hidden_size:
        raise SettingError(f"width must be in [1, {model.config.hidden_size}], the model's, got {width}")
    weights: dict[str, Tensor] = {}
    lost = []
    for number, layer in enumerate(model.model.layers):
        if not isinstance(layer.mlp, MoELayer):
            continue
        parts, share = _latent(bank_of(layer.mlp), width, num_groups)
        weights |= {f"model.layers.{number}{_BANK}{name}": tensor for name, tensor in parts.items()}
        lost.append(share)
    return Factored(remade(model, MixturaConfig.from_dict(values), weights), tuple(lost))


def remade(
    model: MixturaForCausalLM, config: MixturaConfig, replaced: Mapping[str, Tensor]
) -> MixturaForCausalLM:
    """A model of another configuration with a model's tensors, but for its experts and what is given."""
    with torch.device("meta"):
        made: MixturaForCausalLM = MixturaForCausalLM(config).eval()
    kept = {name: tensor for name, tensor in model.state_dict().items() if _BANK not in name}
    made.load_state_dict(kept | dict(replaced), strict=True, assign=True)
    made.tie_weights()
    # Frequencies of rotary positions are in no state.
    made.model.rotary_emb = model.model.rotary_emb
    made.generation_config = model.generation_config
    return made


def common_space(stack: Float[Tensor, "N D"], width: int) -> Float[Tensor, "M D"]:
    """Orthonormal rows on which the rows of a stack lose least when projected: its right singular vectors.

    >>> common_space(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1).abs().round().tolist()
    [[1.0, 0.0]]
    """
    wide = stack.double()
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    space: Tensor = vectors[:, -width:].T.flip(0)
    return space


def _latent(bank: Any, width: int, num_groups: int) -> tuple[dict[str, Tensor], float]:
    """The parameters of latent experts, and how much of the reading matrices is lost."""
    gate_up: Tensor = bank.gate_up_proj
    num_experts = len(gate_up)
    if num_experts % num_groups:
        raise SettingError(f"num_groups must divide the {num_experts} experts, got {num_groups}")
    spaces, own, error, total = [], [], 0.0, 0.0
    for group in gate_up.chunk(num_groups):
        both = [(half, common_space(half.flatten(0, 1), width)) for half in group.chunk(2, dim=1)]
        spaces.append(torch.cat([space for _, space in both]))
        made = [half.double() @ space.T for half, space in both]
        own.append(torch.cat(made, dim=1))
        kept = sum(float(one.square().sum()) for one in made)
        squares = float(group.double().square().sum())
        error, total = error + max(squares - kept, 0.0), total + squares
    parts = {
        "latent_proj": torch.stack(spaces).to(gate_up.dtype),
        "gate_up_latent": torch.cat(own).to(gate_up.dtype),
        "down_proj": bank.down_proj.detach(),
    }
    return parts, (error / total) ** 0.5 if total else 0.0


def require_plain(model: MixturaForCausalLM) -> None:
    """Refuse experts that are not plain, or described layer by layer."""
    by_layer = [one for one in model.config.layers or () if isinstance(one, dict) and "experts" in one]
    for block in model.model.blocks:
        bank = bank_of(block)
        if by_layer or not isinstance(bank, Ffn) or bank.activation != "silu" or not bank.gated or bank.bias:
            raise UnsupportedModelError(
                "latent and finer experts are made of gated experts of silu without biases, the same in all "
                "layers"
            )
    if any(plan is not None and (plan.form is not None or plan.pool != 1) for plan in model.config.plans):
        raise UnsupportedModelError(
            "latent and finer experts are made of layers without a form or a common pool"
        )
