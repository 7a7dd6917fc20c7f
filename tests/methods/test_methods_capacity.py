"""Room for so many tokens an expert, against a plain loop."""

from __future__ import annotations

import torch

from mixtura.methods._capacity import places_in_rounds


def test_places_in_rounds_by_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    chosen = torch.rand(40, 5, generator=generator).argsort(-1)[:, :3]
    chosen[::7, 2] = 5
    priority = torch.randint(0, 3, (40,), generator=generator).float()
    valid = torch.arange(40) % 5 != 3
    found = places_in_rounds(chosen, priority, valid, 5)
    queues = [0] * 5
    order = sorted(range(40), key=lambda token: -float(priority[token]))
    for choice in range(3):
        for token in order:
            expert = int(chosen[token, choice])
            if valid[token] and expert < 5:
                assert found[token, choice] == queues[expert]
                queues[expert] += 1
