"""What the decoder scmoe promises beyond its kind's contract: its paper's formula, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from deciding import several

from mixtura.authoring.contracts._decoded import model, tokenizer
from mixtura.authoring.contracts.decoders import sample_prompt
from mixtura.errors import UserError
from mixtura.methods.decoders.scmoe import Scmoe
from mixtura.running.decoders.entry import decode


def test_logits_are_contrasted_and_unlikely_tokens_are_out() -> None:
    strong, weak = [2.0, 1.0, -4.0], [0.0, 3.0, -9.0]
    made = Scmoe(beta=0.5, alpha=0.1).mix(torch.tensor([[strong, weak]]), several(["a"]))[0].tolist()
    # exp(-6) of the likeliest's probability is less than a tenth.
    assert made == [1.5 * 2.0, 1.5 * 1.0 - 1.5, -math.inf]


def test_what_no_routing_can_say_stays_out() -> None:
    logits = torch.tensor([[[2.0, -math.inf], [0.0, -math.inf]]])
    assert Scmoe(beta=0.5, alpha=0.0).mix(logits, several(["a"]))[0].tolist() == [3.0, -math.inf]


@torch.no_grad()
def test_the_weak_view_is_the_second_expert_alone() -> None:
    inside = model()
    ids = torch.tensor([tokenizer().encode("abcde", add_special_tokens=False)])
    strong = inside(ids).logits[0, -1]
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda gate, given, made: (made[0], torch.tensor([0.0, 1.0]).expand_as(made[1]), made[2])
        )
        for layer in inside.model.layers
    ]
    weak = inside(ids).logits[0, -1]
    for hook in hooks:
        hook.remove()
    likely = strong.log_softmax(-1) >= strong.log_softmax(-1).max() + math.log(0.1)
    expected = (1.5 * strong - 0.5 * weak).masked_fill(~likely, -math.inf).argmax()
    made = decode(inside, tokenizer(), "abcde", "scmoe", max_new_tokens=1)
    assert made.token_ids == (int(expected),)


def test_a_rank_that_no_layer_has_is_refused() -> None:
    with pytest.raises(UserError, match="rank of Scmoe must be less than the 8 experts"):
        Scmoe(rank=8).open(sample_prompt())
