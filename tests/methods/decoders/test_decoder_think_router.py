"""What the decoder think_router promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import torch
from deciding import grown

from mixtura.authoring.contracts._decoded import model, tokenizer
from mixtura.authoring.contracts.decoders import sample_prompt
from mixtura.methods.decoders.think_router import ThinkRouter
from mixtura.running.decoders.entry import decode


def test_with_one_token_in_the_mixture_thinking_is_greedy() -> None:
    made = decode(
        model(), tokenizer(), "abcde", "think_router", threshold=0.0, top=1, temperature=1.0, seed=4
    )
    assert made.token_ids == decode(model(), tokenizer(), "abcde", "greedy").token_ids


@torch.no_grad()
def test_the_model_goes_on_from_the_mean_of_embeddings() -> None:
    inside: Any = model()
    ids = tokenizer().encode("abcde", add_special_tokens=False)
    first = inside(torch.tensor([ids])).logits[0, -1].softmax(-1)
    values, places = first.topk(3)
    table = inside.get_input_embeddings()
    soft = ((values / values.sum())[:, None] * table(places)).sum(0)
    embeddings = torch.cat([table(torch.tensor(ids)), soft[None]])[None]
    second = inside(inputs_embeds=embeddings).logits[0, -1]
    made = decode(inside, tokenizer(), "abcde", "think_router", threshold=0.0, top=3, max_new_tokens=2)
    assert made.token_ids == (int(places[0]), int(second.argmax()))


def test_after_the_end_all_is_plain() -> None:
    router = ThinkRouter(threshold=0.0, end="xy")
    branch = router.open(sample_prompt())[0]
    sure = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    found = router.soften(sure, [grown("abx", branch=branch), grown("xya", branch=branch)])
    assert found is None or found[0].tolist() == [True, False]


def test_cold_steps_in_a_row_end_thinking() -> None:
    router = ThinkRouter(threshold=0.5, end="xy", cold_entropy=0.5, cold_steps=2)
    one = grown("ab", branch=router.open(sample_prompt())[0])
    for sure, expected in (([0.99, 0.01], ""), ([0.5, 0.5], ""), ([0.99, 0.01], ""), ([0.99, 0.01], "xy")):
        router.soften(torch.tensor([sure]), [one])
        forced = router.force(one)
        assert one.prompt.decode(forced).replace(" ", "") == expected
    one.token_ids.append(forced[0])
    assert router.force(one) == forced[1:]
