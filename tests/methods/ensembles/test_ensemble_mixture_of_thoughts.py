"""Mixture of Thoughts against models run layer by layer, and its choice by the prompt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mixtura.authoring.contracts._read_together import built, team
from mixtura.errors import SettingError, UserError
from mixtura.methods.ensembles.mixture_of_thoughts import MixtureOfThoughts
from mixtura.running.ensembling.lessons import Row
from mixtura.running.ensembling.training import Training, train

TOKENS = torch.tensor([[5, 3, 60, 3, 3, 17, 0, 41]])
PROMPT = torch.tensor([3])


def made(apart: float, **settings: Any) -> tuple[MixtureOfThoughts, Any]:
    method = MixtureOfThoughts(**settings)
    of = team(method)
    built(method, of, apart=apart)
    return method, of


def layer_by_layer(model: Any, change: Any) -> torch.Tensor:
    """A model's logits by its parts, one after another; ``change`` is given each layer's output."""
    inside = model.model
    hidden = inside.embed_tokens(TOKENS)
    positions = torch.arange(TOKENS.shape[1])[None]
    rotary = inside.rotary_emb(hidden, positions)
    for place, layer in enumerate(inside.layers):
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden = change(place, hidden)
    logits: torch.Tensor = model.lm_head(inside.norm(hidden))
    return logits


def crossed(crossing: Any, primary: int, states: list[torch.Tensor]) -> torch.Tensor:
    """What a crossing makes of the primary's states, column by column and head by head."""
    latents = [(crossing.into[m].weight @ crossing.norms[m](states[m][0]).T).T for m in range(len(states))]
    width = latents[0].shape[1]
    size = width // crossing.heads
    gathered = torch.zeros_like(latents[primary])
    for column in range(len(gathered)):
        seen = torch.cat([latent[: column + 1] for latent in latents])
        both = seen @ crossing.keys_values.weight.T
        query = crossing.queries.weight @ latents[primary][column]
        for head in range(crossing.heads):
            part = slice(head * size, (head + 1) * size)
            scores = both[:, :width][:, part] @ query[part] / math.sqrt(size)
            gathered[column, part] = scores.softmax(0) @ both[:, width:][:, part]
    return states[primary] + gathered @ crossing.back[primary].weight.T


def test_it_is_the_primary_model_with_states_of_both_between_layers() -> None:
    method, of = made(0.3, stacks=2, heads=2, shared_width=8)
    with torch.no_grad():
        mixed = method(of.read(TOKENS, prompt=PROMPT))
        primary = int(mixed.shares[0, 0].argmax())
        kept: list[torch.Tensor] = []
        layer_by_layer(of.models[1 - primary], lambda place, hidden: kept.append(hidden) or hidden)

        def change(place: int, hidden: torch.Tensor) -> torch.Tensor:
            states = [hidden, kept[place]] if primary == 0 else [kept[place], hidden]
            return crossed(method.crossings[place], primary, states)

        wanted = layer_by_layer(of.models[primary], change).log_softmax(-1)
        plain = of.models[primary](input_ids=TOKENS).logits.log_softmax(-1)
    assert torch.allclose(mixed.log_probabilities, wanted, atol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-2), "the case must have states that matter"


def test_the_router_reads_the_mean_of_the_prompt() -> None:
    method, of = made(0.5)
    with torch.no_grad():
        hidden = of.models[0](input_ids=TOKENS, output_hidden_states=True).hidden_states[-1]
        scores = method.router(hidden[:, :3].mean(1))
        mixed = method(of.read(TOKENS, prompt=PROMPT))
    assert torch.allclose(mixed.state, scores, atol=1e-5)
    assert int(mixed.shares[0, 0].argmax()) == int(scores.argmax())


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_k": 1}, {"stacks": 1}])
def test_untrained_it_is_the_primary_model_exactly(settings: dict[str, int]) -> None:
    method, of = made(0.0, **settings)
    with torch.no_grad():
        mixed = method(of.read(TOKENS, prompt=PROMPT))
        alone = of.models[int(mixed.shares[0, 0].argmax())](input_ids=TOKENS).logits.log_softmax(-1)
    assert torch.equal(mixed.log_probabilities, alone)


def test_one_active_model_reads_itself_alone() -> None:
    method, of = made(0.3, top_k=1)
    with torch.no_grad():
        text = of.read(TOKENS, prompt=PROMPT)
        mixed = method(text)
    # The first model encodes the prompt; besides that only the primary ran.
    runs = [1, 0]
    runs[int(mixed.shares[0, 0].argmax())] += 1
    assert text.num_passes == runs


def test_models_are_without_hooks_afterwards() -> None:
    method, of = made(0.3)
    with torch.no_grad():
        before = [model(input_ids=TOKENS).logits for model in of.models]
        method(of.read(TOKENS, prompt=PROMPT))
        method.crossings[1].back[0].weight = method.crossings[1].back[1].weight = None
        with pytest.raises(TypeError):
            method(of.read(TOKENS, prompt=PROMPT))
        after = [model(input_ids=TOKENS).logits for model in of.models]
    assert all(map(torch.equal, before, after))


def test_training_reaches_the_router_and_makes_text_likelier() -> None:
    rows = [Row(tuple(one), 3) for one in (TOKENS[0].tolist(), TOKENS[0].flip(0).tolist())]
    losses = []
    for _ in range(2):
        method = MixtureOfThoughts(heads=2, shared_width=16)
        of = team(method)
        built(method, of)
        (stage,) = train(method, of, rows, Training(steps=20, batch=2, learning_rate=0.01))
        assert stage.last < stage.first - 0.3
        assert all(bool(one.grad is not None and one.grad.any()) for one in method.router.parameters())
        losses.append(stage.last)
    assert losses[0] == losses[1]


def test_too_many_stacks_or_active_models_are_refused() -> None:
    with pytest.raises(UserError, match="2 layers, fewer than stacks 3"):
        made(0.0, stacks=3)
    with pytest.raises(UserError, match="2 models, fewer than top_k 3"):
        made(0.0, top_k=3)


@pytest.mark.parametrize(
    "settings", [{"top_k": 0}, {"stacks": 0}, {"entropy": -1.0}, {"shared_width": 10, "heads": 4}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        MixtureOfThoughts(**settings)
