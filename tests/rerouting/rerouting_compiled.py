"""A compiled model that has run before it is observed and changed, for the tests; run as a program."""

from __future__ import annotations

from typing import Any

import torch
from rerouted import logits_of, model_of, texts

import mixtura
from mixtura.data.tokens import TokenBatch


def main() -> None:
    """Compare with a model that was never compiled."""
    ids = texts(3, 8)
    batch = {"input_ids": ids}
    tokens = TokenBatch(ids, torch.ones_like(ids), torch.zeros(3, dtype=torch.long), ("text",))
    plain = model_of("qwen3_moe")
    model: Any = torch.compile(model_of("qwen3_moe"), backend="eager")
    own = logits_of(model, batch)
    made, expected = (mixtura.observe(one, tokens, progress=False) for one in (model, plain))
    assert all(torch.equal(a.counts, b.counts) for a, b in zip(made.layers, expected.layers, strict=True))
    for one in (plain, model):
        mixtura.set_router(one, "top_p", p=0.4)
    torch.testing.assert_close(logits_of(model, batch), logits_of(plain, batch))
    assert not torch.allclose(logits_of(model, batch), own)
    mixtura.restore(model)
    torch.testing.assert_close(logits_of(model, batch), own)


if __name__ == "__main__":
    main()
