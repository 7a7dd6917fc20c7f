"""What the decoder mask_experts promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest

from mixtura.authoring.contracts._decoded import model, tokenizer
from mixtura.authoring.contracts.decoders import sample_prompt
from mixtura.errors import UserError
from mixtura.methods.decoders.mask_experts import MaskExperts
from mixtura.running.decoders.entry import decode


def test_a_masked_expert_never_runs() -> None:
    inside: Any = model()
    seen: set[int] = set()
    hook = inside.model.layers[1].mlp.gate.register_forward_hook(
        lambda gate, given, made: seen.update(made[2].flatten().tolist())
    )
    decode(inside, tokenizer(), "abcdefghij", max_new_tokens=20)
    before, masked = set(seen), sorted(seen)[:3]
    seen.clear()
    decode(
        inside, tokenizer(), "abcdefghij", "mask_experts", experts=[[1, e] for e in masked], max_new_tokens=20
    )
    hook.remove()
    assert len(before) > 3
    assert not seen & set(masked)


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ([[7, 0]], "name layer 7; the layers with experts are 0, 1"),
        ([[0, 8]], "name expert 8 of layer 0, which has 8; give one from 0 to 7"),
        ([[0]], "must be pairs of a layer and an expert"),
        ([[0, e] for e in range(7)], "must leave the 2 of layer 0"),
    ],
)
def test_experts_that_are_not_there_are_named(experts: list[list[int]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MaskExperts(experts=experts).open(sample_prompt())
