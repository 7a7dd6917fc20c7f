"""How many parameters a model has, and how many of them compute a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from mixtura.methods import declared_tags
from mixtura.methods.experts import Bank
from mixtura.methods.mixers import Mixer
from mixtura.methods.routers import Router
from mixtura.modeling.causal import MixturaForCausalLM
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.decoder import frozen_noise
from mixtura.modeling.decoder_layer import MixturaDecoderLayer
from mixtura.modeling.forming import passes_of
from mixtura.modeling.parts import bank_of


@final
@dataclass(frozen=True, slots=True)
class Counted:
    """Parameters of a model.

    Attributes:
        total: of all, each once.
        active: without those of experts that a token is not sent to; None where its router does not say to
            how many a token goes.
    """

    total: int
    active: int | None


def count(config: MixturaConfig) -> Counted:
    """The parameters of a model of any size, which is built without memory for them.

    >>> config = MixturaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, moe={"d_expert": 8})
    >>> counted = count(config)
    >>> counted.total - counted.active == 6 * 3 * 16 * 8  # six of eight experts wait
    True
    """
    with frozen_noise(), torch.device("meta"):
        return count_of(MixturaForCausalLM(config))


def count_of(model: MixturaForCausalLM) -> Counted:
    """The parameters of a model; see `count`."""
    total = sum(one.numel() for one in model.parameters())
    used: dict[Bank, float] = {}
    for layer in model.model.layers:
        assert isinstance(layer, MixturaDecoderLayer)
        for one in passes_of(layer.mlp):
            chosen = num_chosen(one.router)
            if chosen is None:
                return Counted(total, None)
            bank = bank_of(one)
            used[bank] = used.get(bank, 0.0) + bank.num_used(chosen)
    held = {bank: sum(one.numel() for one in bank.parameters()) for bank in used}
    # Passes that share experts may send a token to the same one again.
    idle = sum(max(0.0, held[bank] - used[bank]) for bank in used)
    return Counted(total, round(total - idle))


def num_chosen(router: nn.Module) -> int | None:
    """To how many experts a token goes; all where nothing is chosen, None where the router does not say."""
    assert isinstance(router, Router | Mixer)
    if isinstance(router, Mixer) or "gates" in declared_tags(type(router)):
        return router.shape.num_experts
    return router.num_chosen
