"""Adapters that decide by tokens know the pass and the tokens, whatever form these are told in."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from adapting.adapted_models import adapted, plain
from families import tiny_inputs
from torch import Tensor

from mixtura.machine.releases import checkpoint_layers

SETTINGS = {"rank": 2, "num_experts": 3, "top_k": 1, "balance": 0.5, "seed": 4}
IDS = tiny_inputs(plain("qwen3_moe"))["input_ids"]
MASK = (torch.arange(IDS.shape[1]) >= 3).long().expand_as(IDS)


def model_of(balance: float = 0.5) -> Any:
    """A model with LoRA experts that are kept in use."""
    return adapted("qwen3_moe", "moe_lora", settings=SETTINGS | {"balance": balance}).train()


def by_queries() -> Tensor:
    """The mask as queries by keys, added to what is compared."""
    length = IDS.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & MASK[:, None, None].bool()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def test_padding_is_left_out_whatever_form_the_mask_has() -> None:
    """In a tuple as in a record, by name as by place, for tokens as for queries and keys."""
    places = (MASK.cumsum(1) - 1).clamp(min=0)
    ways: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((), {"input_ids": IDS, "attention_mask": MASK}),
        ((IDS, MASK), {}),
        ((), {"input_ids": IDS, "attention_mask": MASK, "return_dict": False}),
        ((), {"input_ids": IDS, "attention_mask": by_queries()}),
    ]
    found = []
    for args, kwargs in ways:
        losses = []
        for balance in (0.5, 0.0):
            made = model_of(balance)(*args, **kwargs, position_ids=places, labels=IDS)
            losses.append(float(made[0]))
        found.append(losses[0] - losses[1])
    assert found == pytest.approx([found[0]] * len(ways), rel=1e-4)
    everything = model_of()(input_ids=IDS, labels=IDS).loss - model_of(0.0)(input_ids=IDS, labels=IDS).loss
    assert abs(float(everything) - found[0]) > 1e-2


def gradients(*, reentrant: bool | None, copied: bool = False) -> dict[str, Tensor]:
    """Of two passes of other sizes, learned from together."""
    model = model_of()
    if copied:
        model(input_ids=IDS, labels=IDS)
        model = deepcopy(model)
    if reentrant is not None:
        model.enable_input_require_grads()
        checkpoint_layers(model, use_reentrant=reentrant)
    items = torch.tensor(40)
    first = model(input_ids=IDS, attention_mask=MASK, labels=IDS, use_cache=False, num_items_in_batch=items)
    second = model(input_ids=IDS[:, :7], labels=IDS[:, :7], use_cache=False)
    (first.loss + 3 * second.loss).backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(("reentrant", "copied"), [(False, False), (True, False), (False, True)])
def test_layers_computed_again_find_their_own_pass(reentrant: bool, copied: bool) -> None:
    wanted = gradients(reentrant=None)
    found = gradients(reentrant=reentrant, copied=copied)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4)
