"""Whether a model that runs from memory and disk computes what it computes in memory, bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.checkpoints.nesting import Widths
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.errors import SettingError, UnmetError
from mixtura.machine.releases import returned_cache, with_cache
from mixtura.report.units import format_bytes
from mixtura.running.loading import load
from mixtura.running.memory.accounting import account
from mixtura.running.memory.available import available_bytes
from mixtura.running.memory.process import release
from mixtura.running.tiers.opening import Wish, tiers_of

# Texts that are tried: how many side by side, and the share of the tokens that each reads at once.
_TRIALS: Final = ((1, 1.0), (3, 0.25), (1, 0.05))
_LEAST_TOKENS: Final = 8
Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What came of comparing two ways to run a model.

    Attributes:
        is_equal: whether all logits were the same, to the bit.
        num_passes: passes that were compared: prompts, batches and single steps.
        num_logits: numbers that were compared.
        first_difference: the first pass that differed, in words; nothing where none did.
        largest_difference: of two logits.
        experts: what was read by the model that runs from disk, as `Statistics.to_dict` gives it.
    """

    is_equal: bool
    num_passes: int
    num_logits: int
    first_difference: str = ""
    largest_difference: float = 0.0
    experts: dict[str, Any] = field(default_factory=dict)


def verify(
    path: str | Path,
    wish: Wish,
    *,
    num_tokens: int = 256,
    num_steps: int = 16,
    bits: Widths | None = None,
    say: Say | None = None,
) -> Verified:
    """Run a model from memory and disk, then in memory, on the same tokens, and compare every logit.

    A long prompt, prompts side by side, a short prompt, and new tokens after each: so all paths that
    generating takes are taken. Token ids are spread over the vocabulary, which touches more experts than
    text does.

    Args:
        path: a checkpoint directory.
        wish: how it runs from memory and disk.
        num_tokens: of the longest prompt.
        num_steps: new tokens after each.
        bits: as `mixtura.load` takes them.
        say: told what is done.

    Raises:
        UnmetError: the machine has not the memory to hold the model, which comparing takes.
        BudgetError: the model cannot run in so little.
        SettingError: there are too few tokens to compare.
    """
    if num_tokens < _LEAST_TOKENS or num_steps < 1:
        raise SettingError(
            f"at least {_LEAST_TOKENS} tokens and 1 step are needed to compare, got {num_tokens} and "
            f"{num_steps}"
        )
    _require_memory(path, num_tokens + num_steps)
    tell = say or (lambda line: None)
    tell("running it from memory and disk")
    model = load(path, bits=bits, memory=wish)
    found = [*_logits(model, num_tokens, num_steps)]
    tiers = tiers_of(model)
    counted = {} if tiers is None else tiers.statistics.to_dict()
    del model, tiers
    gc.collect()
    release()
    tell("running it in memory")
    return _compared(found, _logits(load(path, bits=bits), num_tokens, num_steps), counted)


def _require_memory(path: str | Path, context: int) -> None:
    needed, there = account(open_checkpoint(path), context, batch=3).total_bytes, available_bytes()
    if needed > there:
        raise UnmetError(
            f"comparing takes the whole model in memory once, {format_bytes(needed)}, and "
            f"{format_bytes(there)} are free here; verify it where there is more, or a smaller model"
        )


@torch.no_grad()
def _logits(model: PreTrainedModel, num_tokens: int, num_steps: int) -> Iterator[tuple[str, Tensor]]:
    """Each pass in words, and the logits of its last tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    for rows, share in _TRIALS:
        length = max(2, int(share * num_tokens))
        ids = torch.randint(0, vocabulary, (rows, length + num_steps), generator=generator)
        yield from _text(model, ids, length)


def _text(model: PreTrainedModel, ids: Int[Tensor, "S T"], length: int) -> Iterator[tuple[str, Tensor]]:
    what = f"{ids.shape[0]} x {length} tokens"
    outputs: Any = model(input_ids=ids[:, :length], use_cache=True, logits_to_keep=1)
    yield f"the prompt of {what}", outputs.logits[:, -1].clone()
    cache = returned_cache(outputs)
    for place in range(length, ids.shape[1]) if cache is not None else ():
        outputs = model(input_ids=ids[:, place : place + 1], use_cache=True, **with_cache(cache))
        yield f"token {place - length + 1} after {what}", outputs.logits[:, -1].clone()


def _compared(
    found: list[tuple[str, Tensor]], expected: Iterator[tuple[str, Tensor]], counted: dict[str, Any]
) -> Verified:
    first, largest = "", 0.0
    for (what, one), (_, other) in zip(found, expected, strict=True):
        # By bits: NaN is equal to itself here, and 0 is not to -0.
        if not torch.equal(_bits(one), _bits(other)):
            first = first or what
            largest = max(largest, float((one.double() - other.double()).abs().max()))
    return Verified(
        is_equal=not first,
        num_passes=len(found),
        num_logits=sum(one.numel() for _, one in found),
        first_difference=first,
        largest_difference=largest,
        experts=counted,
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
