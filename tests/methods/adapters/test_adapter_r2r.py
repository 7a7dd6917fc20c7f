"""What the adapter r2r promises beyond its kind's contract."""

from __future__ import annotations

import torch
from methods.adapters.adapter_inputs import SEQUENCES, X, added, by_shares, given, prompt_means, stirred
from methods.adapters.adapter_sites import linear_site


def test_r2r_gives_a_query_one_lora_from_the_probed_layer_on() -> None:
    below, here = stirred("r2r", linear_site(1), rank=3), stirred("r2r", linear_site(2), rank=3, alpha=5.0)
    assert below.change(given()).matrices == {}
    assert [name for name, _ in below.named_parameters()] == ["layers.0", "layers.1"]
    chosen = []
    for mean in prompt_means(X):
        logits = here.layers[1] @ (here.layers[0] @ mean).clamp(min=0)
        chosen.append(int(logits.argmax()))
    shares = [[float(e == chosen[int(s)]) for e in range(3)] for s in SEQUENCES]
    change = here.change(given())
    torch.testing.assert_close(added(change), by_shares(here, shares, 5.0 / 3), rtol=1e-8, atol=1e-10)
    change.shares.square().sum().backward()
    assert here.layers[0].grad.abs().sum() > 0
