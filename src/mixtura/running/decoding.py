"""How the next token is picked: the likeliest one, or drawn in the way a model's author set down.

``generation_config.json`` comes with a model and may say anything: how to draw, other ways to search, what
other runtimes read. transformers applies from there whatever its caller leaves out. Here the entries of
`DRAWING` are checked and taken for drawing, the tokens and strings that end a text always, the rest never.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from mixtura.checkpoints.skeleton import CheckpointView, build
from mixtura.checkpoints.viewing.opening import read_json
from mixtura.errors import CheckpointError, UserError
from mixtura.methods.settings import fits

GENERATION_CONFIG = "generation_config.json"


@final
class _Entry(NamedTuple):
    """An entry that shapes what is drawn: what it must be, in words and as a test of value and vocabulary."""

    wanted: str
    test: Callable[[Any, int], bool]


def _number(wanted: str, low: float, high: float) -> _Entry:
    return _Entry(wanted, lambda value, _: fits(value, float) and low <= value <= high)


def _ids(value: Any, vocabulary: int) -> bool:
    return fits(value, list[int]) and all(0 <= token < vocabulary for token in value)


def _sequences(value: Any, vocabulary: int) -> bool:
    return isinstance(value, list) and all(ids and _ids(ids, vocabulary) for ids in value)


def _biases(value: Any, vocabulary: int) -> bool:
    pairs = isinstance(value, list) and all(isinstance(one, list) and len(one) == 2 for one in value)
    return pairs and all(ids and _ids(ids, vocabulary) and fits(bias, float) for ids, bias in value)


_TINY = 1e-9
_SHARE = _number("a number from 0 to 1", 0, 1)
_POSITIVE_SHARE = _number("a number above 0 and up to 1", _TINY, 1)
_LIMIT = _Entry("a whole number", lambda value, _: fits(value, int))
_IDS = _Entry("a list of token ids", _ids)
DRAWING = {
    "top_k": _LIMIT,
    "top_p": _SHARE,
    "min_p": _SHARE,
    "top_h": _POSITIVE_SHARE,
    "typical_p": _POSITIVE_SHARE,
    "epsilon_cutoff": _SHARE,
    "eta_cutoff": _SHARE,
    "repetition_penalty": _number("a number above 0", _TINY, 1e6),
    "guidance_scale": _number("a number", -1e6, 1e6),
    "no_repeat_ngram_size": _LIMIT,
    "bad_words_ids": _Entry("a list of lists of token ids", _sequences),
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "sequence_bias": _Entry("a list of pairs of token ids and a number", _biases),
    "renormalize_logits": _Entry("true or false", lambda value, _: fits(value, bool)),
}


@final
class CompleteConfig(GenerationConfig):
    """Settings of a generation to which nothing of the model's own is added.

    transformers fills what is None here from ``model.generation_config``, and None is for most entries the
    only value that does nothing.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> Any:
        """Take entries over, but for those of the model's configuration: they alone come in this way."""
        if defaults_only and allow_custom_entries:
            return kwargs
        return super().update(
            defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **kwargs
        )


def read_generation_config(path: Path) -> GenerationConfig | None:
    """The ``generation_config.json`` of a model directory; None where there is none.

    Raises:
        CheckpointError: it cannot be read, is no JSON object or has an entry that transformers refuses.
    """
    file = path / GENERATION_CONFIG
    if not file.exists():
        return None
    entries = read_json(file, "write it again")
    try:
        return GenerationConfig.from_dict(entries)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} cannot be used ({reason}); correct it or delete it") from None


def take_generation_config(model: PreTrainedModel, path: Path) -> None:
    """Give a model the ``generation_config.json`` of its directory, if it has one and the model generates.

    Raises:
        CheckpointError: it cannot be used.
    """
    own = read_generation_config(path)
    if model.can_generate() and own is not None:
        model.generation_config = own


def require_generating(view: CheckpointView) -> None:
    """Refuse a checkpoint that text could not be generated with at temperature 0; no weights are read.

    Raises:
        CheckpointError: its ``generation_config.json`` cannot be used.
        UserError: the model cannot generate, or an entry of that file that is needed is wrong.
    """
    model = build(view)
    take_generation_config(model, view.path)
    decoding_config(model)
    StopStrings(model, None, 0)


def decoding_config(model: PreTrainedModel, temperature: float = 0.0, **more: Any) -> GenerationConfig:
    """What to give ``generate``: greedy at temperature 0, else the model's own way of drawing.

    Args:
        model: any causal language model of transformers.
        temperature: 0 takes the likeliest token each time, whatever the model's configuration says; more
            draws from the whole distribution, or as the entries `DRAWING` of that configuration say.
        more: further entries, such as ``max_new_tokens``.

    Raises:
        UserError: the model cannot generate, or an entry of its configuration that is needed is wrong.
    """
    own = model.generation_config if model.can_generate() else None
    if own is None:
        raise UserError(
            f"{type(model).__name__} cannot generate text: it has no output layer for a next token; "
            "give a causal language model"
        )
    ends = _token_ids(own, "eos_token_id")
    pads = [*_token_ids(own, "pad_token_id"), *ends]
    entries: dict[str, Any] = {"eos_token_id": ends or None, "pad_token_id": pads[0] if pads else 0}
    if temperature > 0:
        # transformers draws from the 50 likeliest tokens where nothing is said.
        entries |= {"do_sample": True, "temperature": float(temperature), "top_k": 0}
        entries |= _drawing(model, own)
    else:
        entries["do_sample"] = False
    return CompleteConfig(**(entries | more))


@final
class StopStrings(StoppingCriteria):
    """Ends a text at any of the strings that its model's configuration says end one.

    That of transformers asks more of a tokenizer than many have, and looks into the prompt.

    Raises:
        UserError: the configuration has something else than strings.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, num_prompt_tokens: int) -> None:
        found = getattr(getattr(model, "generation_config", None), "stop_strings", None) or []
        self._strings = [found] if isinstance(found, str) else found
        if not fits(self._strings, list[str]):
            raise _wrong("stop_strings", found, "a string or a list of strings")
        self._strings = [text for text in self._strings if text]
        self._tokenizer, self._start = tokenizer, num_prompt_tokens
        # A token is a byte at least, but for those that are shown as nothing.
        self._tail = 2 * max((len(text.encode()) for text in self._strings), default=0) + 8

    @property
    def strings(self) -> tuple[str, ...]:
        """What ends a text."""
        return tuple(self._strings)

    def __call__(self, input_ids: Int[Tensor, "S T"], scores: Any, **kwargs: Any) -> Bool[Tensor, " S"]:
        """Whether each sequence is at its end."""
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(tails) if self._strings else [""] * len(tails)
        ended = [any(string in text for string in self._strings) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _token_ids(own: GenerationConfig, name: str) -> list[int]:
    value = getattr(own, name, None)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not fits(ids, list[int]):
        raise _wrong(name, value, "a token id or a list of them")
    # Some write -1 for none.
    return [token for token in ids if token >= 0]


def _drawing(model: PreTrainedModel, own: GenerationConfig) -> dict[str, Any]:
    """The entries of the model's configuration that shape what is drawn, checked."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    found: dict[str, Any] = {}
    for name, entry in DRAWING.items():
        value = getattr(own, name, None)
        if value is None or value == []:
            continue
        if not entry.test(value, vocabulary):
            raise _wrong(name, value, entry.wanted)
        # Other runtimes write -1 for no limit; some of transformers' parts take no 2 for 2.0.
        found[name] = max(value, 0) if entry is _LIMIT else float(value) if fits(value, float) else value
    return found


def _wrong(name: str, value: Any, wanted: str) -> UserError:
    return UserError(
        f"{name} in the model's {GENERATION_CONFIG} must be {wanted}, got {value!r}; correct it or delete it"
    )
