"""What the adapter graph_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from methods.adapters.adapter_inputs import X, added, best, softmax, stirred

from mixtura.types import RouterInput


@pytest.mark.parametrize("rounds", [1, 3])
def test_graph_moe_thinks_in_rounds(rounds: int) -> None:
    made = stirred("graph_moe", rank=3, alpha=5.0, rounds=rounds, hidden=6)
    cell = torch.nn.GRUCell(20, 6, bias=False).double()
    if rounds > 1:
        cell.load_state_dict({"weight_ih": made.w, "weight_hh": made.u})
    wanted = torch.zeros(7, 20, dtype=torch.float64)
    for token, x in enumerate(X):
        here, memory = x, torch.zeros(6, dtype=torch.float64)
        for turn in range(rounds):
            logits = made.gate @ here
            if turn:
                logits = logits + made.gate_memory @ memory
            shares = best(softmax(logits.tolist()), 2)
            out = sum(s * 5 / 3 * (b @ (a @ here)) for s, a, b in zip(shares, made.a, made.b, strict=True))
            wanted[token] += out / rounds
            if turn + 1 < rounds:
                memory = cell(out[None], memory[None])[0]
                here = here + made.told @ memory
    found = added(made.change(RouterInput.of(X)))
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-8, atol=1e-10)
    assert made.change(RouterInput.of(X, training=True)).losses["balance"].item() > 0
