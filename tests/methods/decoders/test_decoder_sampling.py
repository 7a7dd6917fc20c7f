"""What the decoder sampling promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.authoring.contracts._decoded import model, tokenizer
from mixtura.running.decoders.entry import decode


def test_first_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    ids = torch.tensor([tokenizer().encode("abc", add_special_tokens=False)])
    with torch.no_grad():
        likely = (model()(ids).logits[0, -1] / 2).softmax(-1)
    drawn = [
        decode(
            model(), tokenizer(), "abc", "best_of_n", n=400, temperature=2.0, max_new_tokens=1, seed=seed
        ).branches
        for seed in range(2)
    ]
    tokens = torch.tensor([one.token_ids[0] for branches in drawn for one in branches])
    shares = torch.bincount(tokens, minlength=len(likely)) / len(tokens)
    # Total variation of 800 draws over this distribution; one of another temperature is 0.2 away or more.
    assert (shares - likely).abs().sum() / 2 < 0.12
