"""Attentions that are experts, beside ordinary ones that are run one by one and weighed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtura.authoring.contracts._attended import SHAPE, gather, text
from mixtura.errors import SettingError, UserError
from mixtura.methods import create
from mixtura.methods.attentions.attention_experts import AttentionExperts
from mixtura.methods.attentions.grouped_query import GroupedQuery
from mixtura.modeling.family import MixturaConfig, MixturaModel


def _stirred(method: AttentionExperts, seed: int) -> AttentionExperts:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return method


def _alone(method: AttentionExperts, number: int, **settings: Any) -> GroupedQuery:
    """One of the experts as ordinary attention."""
    ordinary = GroupedQuery(SHAPE, **settings)
    state = {
        name.partition(".")[2].partition(".")[2]: value
        for name, value in method.state_dict().items()
        if name.startswith(f"members.{number}.")
    }
    common = {
        name.removeprefix("common."): value
        for name, value in method.state_dict().items()
        if name.startswith("common.")
    }
    ordinary.load_state_dict(state | common)
    return ordinary


@pytest.mark.parametrize("keys", ["own", "shared"])
@pytest.mark.parametrize("norm", ["none", "head", "full"])
def test_equals_its_experts_run_one_by_one(keys: str, norm: str) -> None:
    settings = {"bias": True, "query_key_norm": norm, "window": 5}
    method = _stirred(AttentionExperts(SHAPE, num_experts=3, keys=keys, seed=2, **settings), 1)
    given = text(1)
    shares = (given.x.double() @ method.gate.double().T).softmax(-1)
    wanted = sum(
        shares[..., number, None] * gather(_alone(method, number, **settings), given)[0].double()
        for number in range(3)
    )
    torch.testing.assert_close(gather(method, given)[0].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", ["own", "shared"])
def test_experts_that_are_alike_are_ordinary_attention(keys: str) -> None:
    method = AttentionExperts(SHAPE, num_experts=4, keys=keys, seed=3)
    with torch.no_grad():
        for member in method.members[1:]:
            member.load_state_dict(method.members[0].state_dict())
    given = text(2)
    torch.testing.assert_close(gather(method, given)[0], gather(_alone(method, 0), given)[0])


def test_shared_keys_keep_the_cache_of_one_attention() -> None:
    heads = {}
    for keys in ("own", "shared"):
        attention = {"name": "attention_experts", "num_experts": 3, "keys": keys}
        config = MixturaConfig(
            hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, vocab_size=50, attention=attention
        )
        cache = MixturaModel(config).eval()(torch.arange(9)[None], use_cache=True).past_key_values
        heads[keys] = cache.layers[0].keys.shape[1]
    assert heads == {"own": 6, "shared": 2}


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="keys"):
        create("attentions", "attention_experts", SHAPE, keys="mine")
    with pytest.raises(SettingError, match="num_experts"):
        AttentionExperts(SHAPE, num_experts=0)
    with pytest.raises(SettingError, match="window"):
        AttentionExperts(SHAPE, window=0)
