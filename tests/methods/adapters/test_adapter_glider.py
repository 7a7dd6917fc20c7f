"""What the adapter glider promises beyond its kind's contract."""

from __future__ import annotations

import torch
from methods.adapters.adapter_inputs import (
    SEQUENCES,
    X,
    added,
    best,
    by_shares,
    given,
    prompt_means,
    softmax,
    stirred,
)

from mixtura.types import RouterInput


def test_glider_adds_up_what_the_token_and_the_prompt_say() -> None:
    made = stirred("glider", rank=3, alpha=5.0, guidance=2.0)
    means, shares = prompt_means(X), []
    for token, x in enumerate(X):
        logits = []
        for row, task in zip(made.gate, made.tasks, strict=True):
            normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
            other = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()
            prompt = means[int(SEQUENCES[token])]
            cosine = float(prompt @ task) / float(prompt.norm() * task.norm())
            logits.append(float(normed @ other) / 4.0 + 2.0 * cosine)
        shares.append(best(softmax(logits), 2))
    change = made.change(given())
    torch.testing.assert_close(added(change), by_shares(made, shares, 5.0 / 3), rtol=1e-8, atol=1e-10)
    made.guidance = 1e5
    alike = made.change(given()).shares
    assert all(torch.equal(alike[t] > 0.5, alike[0] > 0.5) for t in (1, 2, 3))
    told = made.change(RouterInput.of(X, state=change.state)).shares
    torch.testing.assert_close(told, alike)
