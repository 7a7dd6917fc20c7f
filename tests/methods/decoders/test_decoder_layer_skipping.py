"""What the decoder layer_skipping promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtura.authoring.contracts._decoded import model, tokenizer
from mixtura.authoring.contracts.decoders import sample_prompt
from mixtura.errors import UserError
from mixtura.methods.decoders.layer_skipping import LayerSkipping, reserved
from mixtura.running.decoders.entry import decode

NUMBERS, SPEEDUPS = (2, 3, 6, 12, 24, 30, 61), (1.0, 1.2, 1.5, 2.0, 3.0)
# What leaves fewer than two layers is refused.
POSSIBLE = [(number, speedup) for number in NUMBERS for speedup in SPEEDUPS if int(number / speedup) >= 2]


@pytest.mark.parametrize(("number", "speedup"), POSSIBLE)
def test_first_and_last_stay_and_no_more_than_asked_for(number: int, speedup: float) -> None:
    kept = reserved(number, speedup)
    assert {0, number - 1} <= set(kept)
    assert len(kept) <= max(2, int(number / speedup))
    assert speedup > 1 or kept == tuple(range(number))


@torch.no_grad()
def test_skipped_layers_do_nothing_and_leave_no_hole_in_the_cache() -> None:
    inside: Any = model()
    ran: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, given, made, place=place: ran.append(place))
        for place, layer in enumerate(inside.model.layers)
    ]
    made = decode(inside, tokenizer(), "abcde", "layer_skipping", speedup=2.0, max_new_tokens=4)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2, 3, *[0, 3] * (len(made.token_ids) - 1)]
    assert made.cost.layer_passes == len(ran)


def test_too_much_speed_is_refused() -> None:
    with pytest.raises(UserError, match="speedup of LayerSkipping must leave two of the 2 layers"):
        LayerSkipping(speedup=1.5).open(sample_prompt())
