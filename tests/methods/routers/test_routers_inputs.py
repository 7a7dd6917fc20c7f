"""What a router says of an input that does not fit, without annotations being checked as the program runs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods import create
from mixtura.methods.routers.read_me import ReadMe
from mixtura.methods.routers.stable_moe import StableMoe
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=4, d_expert=8, num_experts=3)

SAY = """
import json, torch
from mixtura.errors import UserError
from mixtura.modeling.layer import Experts
from mixtura.methods import create
from mixtura.types import LayerShape, RouterInput
shape = LayerShape(d_model=4, d_expert=8, num_experts=3)
whole = torch.arange(5)
cases = {
    "x": dict(x=torch.zeros(5, 3)),
    "x in three dimensions": dict(x=torch.zeros(1, 5, 4), valid=torch.ones(1, dtype=torch.bool)),
    "valid": dict(valid=torch.ones(4, dtype=torch.bool)),
    "valid of numbers": dict(valid=torch.ones(5, dtype=torch.long)),
    "positions": dict(positions=whole[1:]),
    "positions of fractions": dict(positions=whole / 2),
    "sequence_ids": dict(sequence_ids=whole[None]),
    "token_ids": dict(token_ids=whole[1:]),
    "labels": dict(labels={"domain": whole[1:]}),
    "attention": dict(attention=torch.zeros(4, 5)),
    "state": dict(state=torch.zeros(4, 3)),
    "allowed": dict(allowed=torch.ones(5, 2, dtype=torch.bool)),
    "selection_bias": dict(selection_bias=torch.zeros(4)),
    "experts": dict(experts=Experts(LayerShape(4, 8, 2)).matrices),
}
said = {}
for name, fields in cases.items():
    given = dict(x=torch.zeros(5, 4)) | fields
    try:
        create("routers", "top_k", shape)(RouterInput.of(given.pop("x"), **given))
        said[name] = None
    except UserError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def test_each_wrong_field_is_named_in_one_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    for name, message in said.items():
        assert message, f"{name} is accepted"
        assert "\n" not in message
    assert said.pop("x") == (
        "TopK is made for tokens of 4 features, got 3; give it the ones of its own layer"
    )
    assert said.pop("experts") == "TopK is made for 3 experts, got 2; give it the ones of its own layer"
    for name, message in said.items():
        assert name.split()[0] in message


@pytest.mark.parametrize("router", ["read_me", "pre_gated", "lr_moe", "r_moe", "moe_plus_plus"])
def test_a_state_of_another_width_is_refused(router: str) -> None:
    made = create("routers", router, SHAPE)
    fields = {"token_ids": torch.arange(5), "positions": torch.arange(5), "layer": 1}
    with pytest.raises(UserError, match=f"{type(made).__name__} needs a state of .* got \\(5, 129\\)"):
        made(RouterInput.of(torch.zeros(5, 4), state=torch.zeros(5, 129), **fields))


def test_the_state_of_a_layer_with_more_experts_is_refused() -> None:
    fields = {"token_ids": torch.arange(5), "positions": torch.arange(5)}
    first = ReadMe(LayerShape(4, 8, 8))(RouterInput.of(torch.zeros(5, 4), **fields))
    with pytest.raises(UserError, match="ReadMe needs a state of 4 logits a token"):
        ReadMe(LayerShape(4, 8, 4))(RouterInput.of(torch.zeros(5, 4), layer=1, state=first.state))


def test_bigrams_are_not_decoded_without_history() -> None:
    fields = {"token_ids": torch.arange(5), "positions": torch.arange(5), "decoding": True}
    inputs = RouterInput.of(torch.zeros(5, 4), **fields)
    assert StableMoe(SHAPE)(inputs).load.sum() == 5
    with pytest.raises(UserError, match="cannot decode without the history"):
        StableMoe(SHAPE, context="bigram")(inputs)
