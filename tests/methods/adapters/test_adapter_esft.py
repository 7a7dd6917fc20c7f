"""What the adapter esft promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import torch
from methods.adapters.adapter_sites import experts_site

from mixtura.authoring.contracts import sample_trace
from mixtura.methods.adapters.esft import Esft
from mixtura.types import Own, RouterInput
from mixtura.types.trace import Trace


def trace_of(counts: list[int], weights: list[float]) -> Trace:
    """One layer of four experts."""
    trace = sample_trace(num_layers=1, num_experts=4, top_k=1)
    layer = replace(
        trace.layers[0], counts=torch.tensor([counts] * 2), weight_sums=torch.tensor([weights] * 2)
    )
    return replace(trace, layers=(layer,))


def test_the_fewest_experts_that_have_the_share_together_are_chosen() -> None:
    trace = trace_of([50, 30, 15, 5], [1.0, 4.0, 4.0, 1.0])
    chosen = [
        Esft.settings_from(trace, {"top_p": p})["experts"]["0"] for p in (0.2, 0.5, 0.51, 0.8, 0.9, 1.0)
    ]
    assert chosen == [[0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert Esft.settings_from(trace, {"score": "gate", "top_p": 0.5})["experts"] == {"0": [1, 2]}
    assert Esft.settings_from(trace, {"score": "all"}) == {}


def test_it_starts_with_the_bases_own_matrices_as_they_are_stored() -> None:
    made = Esft(experts_site(transposed=True), experts=[3, 1])
    stacks = {"up": torch.randn(4, 16, 24), "down": torch.randn(4, 12, 16)}
    made.start(stacks)
    change = made.change(RouterInput.of(torch.zeros(0, 16)))
    assert change.expert_ids == (1, 3)
    for name, stack in stacks.items():
        part = change.matrices[name]
        assert isinstance(part, Own)
        assert torch.equal(part.weight, stack[[1, 3]])
