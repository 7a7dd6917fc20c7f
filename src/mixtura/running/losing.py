"""What a decoder that leaves experts out, or chooses others, costs in quality, and what it saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.text import held_out
from mixtura.data.tokens import encode_text, num_embeddings_of
from mixtura.errors import SettingError, UserError
from mixtura.methods.decoders import Branch, Candidate, Decoder, Prompt
from mixtura.running.decoders.bundle import Bundle, Cost, Row
from mixtura.running.decoders.composing import composed
from mixtura.running.decoders.entry import Wanted, prepared, prompt_of, require_given
from mixtura.running.decoders.loop import Runner
from mixtura.running.loading import load
from mixtura.running.tiers.opening import Wish, tiers_of

_TEXTS: Final = 4
_LEAST_TOKENS: Final = 4
# What a decoder may do besides steering, which a text that is given to it would not show.
_BESIDES: Final = ("mix", "force", "soften", "revise", "leave", "choose")
Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """What came of running texts in the way of a decoder beside the model as it is, both on the same tokens.

    Attributes:
        num_tokens: whose predictions were compared.
        divergence: mean Kullback-Leibler divergence from the model's predictions, in nats.
        largest_divergence: of a token.
        same_choice: share of tokens whose likeliest next token is the same.
        nats: mean negative log-likelihood of the texts, of the model and of the decoder.
        left_out: share of the experts that the model runs and the decoder does not.
        read_bytes: from disk for a token, by the model and by the decoder; 0 for one that is in memory.
    """

    num_tokens: int
    divergence: float
    largest_divergence: float
    same_choice: float
    nats: tuple[float, float]
    left_out: float
    read_bytes: tuple[float, float]


def measure_loss(
    path: Path,
    wish: Wish | None,
    decoders: Sequence[Decoder],
    *,
    calibrations: Sequence[str] = (),
    num_tokens: int = 256,
    say: Say = lambda line: None,
) -> Lost:
    """Run held-out texts with a decoder and without, token by token, and compare what is predicted.

    Args:
        path: a checkpoint directory.
        wish: how it runs from memory and disk; None for all of it in memory.
        decoders: one, or several to be combined, that change nothing but the choice of experts.
        calibrations: files that they need.
        num_tokens: to compare, over all texts.
        say: told what is done.

    Raises:
        UserError: a decoder does more than steer, or lacks what it needs.
        SettingError: there are too few tokens.
    """
    if num_tokens < _LEAST_TOKENS * _TEXTS:
        raise SettingError(f"at least {_LEAST_TOKENS * _TEXTS} tokens are needed, got {num_tokens}")
    _require_steering(decoders)
    tokenizer = load_tokenizer(path)
    model = load(path, memory=wish)
    each = num_tokens // _TEXTS
    wanted = Wanted(calibrations=tuple(calibrations), max_new_tokens=each + 1)
    decoder, found = composed(decoders), []
    require_given(decoders, verifier=None, calibrated=bool(calibrations), num_more=0)
    with prepared(model, decoders) as runners:
        for number, ids in enumerate(_texts(model, tokenizer, each)):
            say(f"text {number + 1} of {_TEXTS}")
            given, rest = tuple(ids[:each]), ids[each:]
            prompt = prompt_of("", given, runners, tokenizer, decoders, wanted, Cost())
            (branch,) = decoder.open(prompt)
            plain, changed = (_followed(runners[0], prompt, one, rest) for one in (Branch(), branch))
            found.append((plain, changed, torch.tensor(rest)))
    return _summed(found)


def _require_steering(decoders: Sequence[Decoder]) -> None:
    for one in decoders:
        more = [name for name in _BESIDES if getattr(type(one), name) is not getattr(Decoder, name)]
        if more:
            raise UserError(
                f"{type(one).__name__} does more than choose experts ({more[0]}), which a given text does "
                "not show; measure it by mixtura arena decoders"
            )


def _texts(model: Any, tokenizer: Any, each: int) -> list[list[int]]:
    """As many texts, of a prompt and as many tokens after it."""
    made: list[list[int]] = []
    for document in held_out(_TEXTS * each * 64, 0):
        ids = encode_text(document.text, tokenizer, num_embeddings_of(model.config))
        if len(ids) >= 2 * each:
            made.append(ids[: 2 * each])
        if len(made) == _TEXTS:
            return made
    raise SettingError(f"no {_TEXTS} held-out texts have {2 * each} tokens; compare fewer tokens")


class _Followed(NamedTuple):
    """Logits before each token of a text, experts that ran for these, and bytes that were read for them."""

    logits: Float[Tensor, "T V"]
    num_assignments: int
    read_bytes: int


def _followed(runner: Runner, prompt: Prompt, branch: Branch, rest: Sequence[int]) -> _Followed:
    if len(branch.views) != 1:
        raise UserError("a decoder of several views mixes them, which a given text does not show")
    cost = Cost()
    bundle = Bundle(runner.model, runner.facts, runner.stepping, branch.views[0].skipped, cost)
    one = Candidate(prompt=prompt, branch=branch, token_ids=[])
    made = [bundle.read([Row(one, 0)], len(rest))]
    before, tiers = cost.num_assignments, tiers_of(runner.model)
    if tiers is not None:
        tiers.forget_statistics()
    for token in rest[:-1]:
        one.token_ids.append(token)
        made.append(bundle.step(torch.tensor([token]), torch.tensor([True])))
    read = 0 if tiers is None else tiers.forget_statistics().demanded_bytes
    return _Followed(torch.cat(made), cost.num_assignments - before, read)


def _summed(found: Sequence[tuple[_Followed, _Followed, Tensor]]) -> Lost:
    both = [(plain, changed) for plain, changed, _ in found]
    plain, changed = (torch.cat([pair[place].logits for pair in both]).log_softmax(-1) for place in (0, 1))
    targets = torch.cat([text[2] for text in found])[:, None]
    divergence = (plain.exp() * (plain - changed)).sum(-1)
    ran = [sum(pair[place].num_assignments for pair in both) for place in (0, 1)]
    read = [sum(pair[place].read_bytes for pair in both) / len(targets) for place in (0, 1)]
    return Lost(
        num_tokens=len(targets),
        divergence=float(divergence.mean()),
        largest_divergence=float(divergence.max()),
        same_choice=float((plain.argmax(-1) == changed.argmax(-1)).float().mean()),
        nats=(float(-plain.gather(1, targets).mean()), float(-changed.gather(1, targets).mean())),
        left_out=1 - ran[1] / max(ran[0], 1),
        read_bytes=(read[0], read[1]),
    )
