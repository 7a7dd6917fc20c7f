"""Continuing a prompt by an ensemble, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import final

import torch

from mixtura.data.tokens import num_embeddings_of
from mixtura.errors import check_range
from mixtura.methods.ensembles import Ensemble
from mixtura.running.decoding import decoding_config
from mixtura.running.ensembling.team import Team, frozen
from mixtura.running.generation import check_positions, encode_prompt


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Continued:
    """What an ensemble made of a prompt.

    Attributes:
        text: the new text, special tokens removed.
        token_ids: its tokens, an end token included.
        num_prompt_tokens: of the prompt.
        shares: what part each model had in the new tokens, on average.
        num_passes: by model, a model of the method's own last, its forward passes.
        num_tokens: by model, tokens that it ran.
        seconds: that it took.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    shares: tuple[float, ...]
    num_passes: tuple[int, ...]
    num_tokens: tuple[int, ...]
    seconds: float


@torch.no_grad()
def continue_text(
    ensemble: Ensemble,
    team: Team,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Continued:
    """Continue a prompt; temperature 0 takes the likeliest token each time.

    Raises:
        SettingError: a number is out of range.
        UserError: the prompt and what is to follow are more than a model has positions for.
    """
    check_range("continue_text", "max_new_tokens", max_new_tokens, 1, 1 << 30)
    check_range("continue_text", "temperature", temperature, 0.0, 100.0)
    check_range("continue_text", "seed", seed, 0, (1 << 63) - 1)
    tokenizer, begun = team.tokenizer, perf_counter()
    embeddings = num_embeddings_of(team.models[0].config)
    ids = encode_prompt(tokenizer, prompt, chat=chat, num_embeddings=embeddings)
    ends = {end for one in team.models for end in (decoding_config(one).eos_token_id or [])}
    for one in team.all:
        check_positions(one, len(ids), max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    made: list[int] = []
    shares, told = torch.zeros(len(team.models)), ""
    ensemble.eval()
    with frozen(team):
        text, state = team.read(ids[None], grows=True), None
        while True:
            mixed = ensemble(text, state)
            state, said = mixed.state, mixed.log_probabilities[0, -1].float().cpu()
            shares += mixed.shares[0, -1].float().cpu()
            made.append(_drawn(said, temperature, generator))
            if on_text is not None:
                whole = str(tokenizer.decode(made, skip_special_tokens=True))
                # A character may be of several tokens, the last of which are still to come.
                if not whole.endswith("\ufffd"):
                    on_text(whole[len(told) :])
                    told = whole
            if made[-1] in ends or len(made) == max_new_tokens:
                break
            text.extend(torch.tensor([[made[-1]]]))
    return Continued(
        text=str(tokenizer.decode(made, skip_special_tokens=True)),
        token_ids=tuple(made),
        num_prompt_tokens=len(ids),
        shares=tuple((shares / len(made)).tolist()),
        num_passes=tuple(text.num_passes),
        num_tokens=tuple(text.num_tokens),
        seconds=perf_counter() - begun,
    )


def _drawn(said: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if not temperature:
        return int(said.argmax())
    return int(torch.multinomial((said / temperature).softmax(-1), 1, generator=generator))
