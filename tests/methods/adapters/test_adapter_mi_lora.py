"""What the adapter mi_lora promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.adapters.adapter_inputs import (
    SEQUENCES,
    VALID,
    X,
    added,
    best,
    by_shares,
    given,
    prompt_means,
    softmax,
    stirred,
)

from mixtura.errors import UserError
from mixtura.types import MatrixShape, RouterInput, Site

PEERS = ("a.q_proj", "a.k_proj", "a.o_proj")


def mi_loras(**settings: Any) -> list[Any]:
    """The three sites of one layer."""
    shapes = {"weight": MatrixShape(20, 16)}
    sites = [
        Site(name=name, kind="linear", layer=0, num_layers=1, matrices=shapes, peers=PEERS) for name in PEERS
    ]
    made = [stirred("mi_lora", site, rank=3, alpha=5.0, **settings) for site in sites]
    for one in made:
        one.join(made[0])
    return made


def test_mi_lora_decides_once_for_a_layer_by_the_prompt() -> None:
    made = mi_loras(top_k=2, balance=0.3)
    means = prompt_means(X)
    weights = [[2 * w for w in best(softmax((made[0].gate @ m).tolist()), 2)] for m in means]
    first = made[0].change(given(training=True))
    for place, one in enumerate(made):
        change = first if place == 0 else one.change(given(state=first.state))
        shares = [[weights[int(s)][place]] for s in SEQUENCES]
        torch.testing.assert_close(added(change), by_shares(one, shares, 5.0 / 3), rtol=1e-8, atol=1e-10)
    scores = [softmax((made[0].gate @ m).tolist()) for m in means]
    rows = [(scores[int(s)], weights[int(s)]) for s, v in zip(SEQUENCES, VALID, strict=True) if v]
    total = 0.0
    for e in range(3):
        share = sum(w[e] > 0 for _, w in rows) / (2 * len(rows))
        total += 3 * share * sum(p[e] for p, _ in rows) / len(rows)
    # The layer's one loss stands for its three sites, of which the core takes the mean.
    assert first.losses["balance"].item() == pytest.approx(0.3 * 3 * total)
    with pytest.raises(UserError, match=r"a\.k_proj runs before a\.q_proj"):
        made[1].change(given())


def test_mi_lora_with_even_weights_of_all_is_plain_lora() -> None:
    made = mi_loras(top_k=3)
    with torch.no_grad():
        made[0].gate.zero_()
    state = made[0].change(given()).state
    torch.testing.assert_close(state, torch.ones_like(state))
    later = RouterInput.of(X[:2], sequence_ids=torch.tensor([0, 1]), history={"prompt": torch.ones(2, 16)})
    torch.testing.assert_close(made[0].change(later).state, torch.ones(2, 3, dtype=torch.float64))
