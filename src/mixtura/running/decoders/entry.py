"""Generating text by a decoder: prompts in, texts and what they took out; the model as it was afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from transformers import PreTrainedModel

from mixtura.checkpoints.viewing.wrappers import plain_model
from mixtura.data.tokens import encode_text, num_embeddings_of, pad_id
from mixtura.errors import UnsupportedModelError, UserError, check_range
from mixtura.methods import create
from mixtura.methods.decoders import Calibration, Candidate, Decoder, Prompt, Verifier
from mixtura.rerouting.core import Rerouting
from mixtura.running.decoders.bundle import Cost
from mixtura.running.decoders.composing import composed, name_of, tags_of
from mixtura.running.decoders.drawing import Drawing
from mixtura.running.decoders.facts import facts_of, steered
from mixtura.running.decoders.loop import Loop, Runner
from mixtura.running.decoders.probing import ModelProbe, load_calibration
from mixtura.running.decoders.steering import Steerer
from mixtura.running.decoders.stepping import Stepping
from mixtura.running.decoding import StopStrings, decoding_config
from mixtura.running.generation import Clock, OnText, check_positions, encode_prompt


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """One branch as it ended."""

    text: str
    token_ids: tuple[int, ...]
    verdict: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What a decoder made of one prompt.

    Attributes:
        text: the answer, special tokens removed.
        token_ids: its new tokens, an end token included.
        num_prompt_tokens: of the prompt.
        branches: all that had grown in the end, the answer among them.
        chosen: its place among them.
        cost: what all prompts of the call took together.
        prefill_ms: time to the first token.
        decode_ms: time for the others.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    branches: tuple[Grown, ...]
    chosen: int
    cost: Cost
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """The answer's tokens after the first in a second; 0 where there are none."""
        return (len(self.token_ids) - 1) / self.decode_ms * 1000 if self.decode_ms > 0 else 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How to decode, apart from the decoder's own settings; the arguments of `decode`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False
    verifier: Verifier | None = None
    calibrations: tuple[str, ...] = ()
    models: tuple[PreTrainedModel, ...] = ()
    on_text: OnText | None = None


def decode(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str | Sequence[str],
    decoder: str | Decoder | Sequence[str | Decoder] = "greedy",
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    verifier: Verifier | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
    models: Sequence[PreTrainedModel] = (),
    on_text: OnText | None = None,
    **settings: Any,
) -> Any:
    """Continue a prompt, or several side by side, in the way of a decoder.

    Args:
        model: from `mixtura.load`, or any causal language model of transformers.
        tokenizer: the model's.
        prompt: text to continue; for several a list is returned.
        decoder: a name of ``mixtura methods decoders``, the path of a file, a decoder that is made already,
            or several of these to be combined.
        max_new_tokens: of each branch, at most.
        temperature: of draws where the decoder leaves it to the user; 0 takes the likeliest token.
        seed: of the draws.
        chat: put prompts through the tokenizer's chat template.
        verifier: scores texts that continue a prompt, higher for better: ``verifier(prompt, texts)``.
        calibration: file that `mixtura calibrate` made, or several.
        models: further models of the same vocabulary, for a decoder that runs several.
        on_text: called with pieces of the text as they are made, where there is one branch of one prompt.
        **settings: the decoder's own, where it is given by one name.

    Returns:
        A `Decoded`, or a list of them where a list of prompts was given.

    Raises:
        UnsupportedModelError: the decoder changes routing, and the model is dense or of a family that mixtura
            cannot work on.
        SettingError: a setting is unknown or out of range.
        UserError: the decoder lacks what it needs, or it was made for another model.
    """
    check_range("decode", "max_new_tokens", max_new_tokens, 1, 1 << 30)
    check_range("decode", "temperature", temperature, 0.0, 100.0)
    check_range("decode", "seed", seed, 0, (1 << 63) - 1)
    given = [decoder] if isinstance(decoder, str | Decoder) else list(decoder)
    if settings and (len(given) != 1 or not isinstance(given[0], str)):
        raise UserError("settings belong to a decoder that is given by its name alone; make each with create")
    decoders = [create("decoders", one, **settings) if isinstance(one, str) else one for one in given]
    paths = [calibration] if isinstance(calibration, str | Path) else list(calibration or ())
    wanted = Wanted(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        verifier=verifier,
        calibrations=tuple(map(str, paths)),
        models=tuple(models),
        on_text=on_text,
    )
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    require_given(decoders, verifier=verifier, calibrated=bool(paths), num_more=len(wanted.models))
    with prepared(model, decoders, wanted.models) as runners:
        made = _decoded(runners, tokenizer, prompts, decoders, wanted, Cost())
    return made[0] if isinstance(prompt, str) else made


@contextmanager
def prepared(
    model: PreTrainedModel, decoders: Sequence[Decoder], models: Sequence[PreTrainedModel] = ()
) -> Iterator[list[Runner]]:
    """Models to run, their routers with seats where a decoder steers; all is taken back afterwards."""
    steers = "steers" in tags_of(decoders)
    with ExitStack() as undo:
        runners = [undo.enter_context(_runner(one, steers=steers)) for one in (model, *models)]
        for other in runners[1:]:
            if other.facts.vocabulary != runners[0].facts.vocabulary:
                raise UserError(
                    f"the further model has a vocabulary of {other.facts.vocabulary} entries, the model one "
                    f"of {runners[0].facts.vocabulary}; give models of the same vocabulary"
                )
        yield runners


@contextmanager
def _runner(model: PreTrainedModel, *, steers: bool) -> Iterator[Runner]:
    was_there = isinstance(vars(plain_model(model)).get("mixtura_rerouting"), Rerouting)
    was_training = model.training
    found = steered(model) if steers else None
    steerer = None if found is None else Steerer(found)
    model.eval()
    try:
        facts = facts_of(model, found)
        if steers and not facts.layers:
            raise UnsupportedModelError(
                "a table of token ids chooses the experts of every layer, so that no router can be steered"
            )
        stepping = Stepping(model, facts, steerer)
        yield Runner(model=model, facts=facts, steerer=steerer, stepping=stepping)
    finally:
        model.train(was_training)
        if steerer is not None:
            steerer.sit()
            steerer.remove()
        if found is not None and not was_there:
            found.restore()


def require_given(
    decoders: Sequence[Decoder], *, verifier: Verifier | None, calibrated: bool, num_more: int
) -> None:
    """Refuse decoders that lack what they need, before anything is run.

    Raises:
        UserError: a verifier, a calibration or further models are missing, or given to none that reads them.
    """
    tags = tags_of(decoders)
    name = " and ".join(type(one).__name__ for one in decoders)
    if "needs:verifier" in tags and verifier is None:
        raise UserError(
            f"{name} chooses by a verifier; give one with --verifier FILE.py (a function "
            "verify(prompt, texts) that returns a score for each), or verifier= in Python"
        )
    if verifier is not None and not tags & {"needs:verifier", "may_use:verifier"}:
        raise UserError(f"{name} asks no verifier; leave it out, or choose a decoder such as best_of_n")
    if "needs:models" in tags and not num_more:
        raise UserError(f"{name} runs several models; give the others with --model-too, or models= in Python")
    if "needs:models" not in tags and num_more:
        raise UserError(f"{name} runs one model; leave further ones out")
    if "needs:calibration" in tags and not calibrated:
        raise UserError(
            f"{name} needs a calibration; make one with 'mixtura calibrate' and give it by --calibration FILE"
        )
    if "needs:calibration" not in tags and calibrated:
        raise UserError(f"{name} reads no calibration; leave --calibration out")


def _decoded(
    runners: Sequence[Runner],
    tokenizer: Any,
    texts: Sequence[str],
    decoders: Sequence[Decoder],
    wanted: Wanted,
    cost: Cost,
) -> list[Decoded]:
    model, tags = runners[0].model, tags_of(decoders)
    if "exits" in tags and len(texts) > 1:
        # Which layers run is decided for one text at a time.
        return [_decoded(runners, tokenizer, [one], decoders, wanted, cost)[0] for one in texts]
    if not texts:
        return []
    decoder = composed(decoders)
    ids = [
        encode_prompt(tokenizer, one, chat=wanted.chat, num_embeddings=num_embeddings_of(model.config))
        for one in texts
    ]
    for one in ids:
        check_positions(model, len(one), wanted.max_new_tokens)
    clock = Clock(tokenizer, wanted.on_text if len(texts) == 1 and "several" not in tags else None)
    prompts = [
        prompt_of(text, tuple(one.tolist()), runners, tokenizer, decoders, wanted, cost)
        for text, one in zip(texts, ids, strict=True)
    ]
    stops = [StopStrings(model, tokenizer, len(one)) for one in ids]

    def grow(_: Any, input_ids: Any, logits_processor: Any, **rest: Any) -> list[list[Candidate]]:
        del input_ids, rest
        drawing = Drawing(logits_processor, wanted.temperature, wanted.seed)
        loop = Loop(
            decoder=decoder,
            tags=tags,
            runners=runners,
            drawing=drawing,
            prompts=prompts,
            stops=stops,
            cost=cost,
            on_token=lambda token: clock.put(torch.tensor([token])),
        )
        return loop.run()

    clock.put(ids[0][None])
    groups = _by_generate(model, tokenizer, ids, wanted, grow)
    clock.end()
    made = []
    for prompt, group in zip(prompts, groups, strict=True):
        made.append(_result(decoder, prompt, group, cost, clock))
    return made


def _by_generate(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Sequence[torch.Tensor],
    wanted: Wanted,
    grow: Callable[..., list[list[Candidate]]],
) -> list[list[Candidate]]:
    """Let transformers prepare what shapes draws, as the model's configuration says, and run the loop."""
    # A temperature of 1 is none: each branch has its own.
    config = decoding_config(model, 1.0, max_new_tokens=wanted.max_new_tokens)
    width = max(map(len, ids))
    pad = pad_id(tokenizer, num_embeddings_of(model.config), ("pad_token_id", "eos_token_id"))
    padded = torch.full((len(ids), width), pad)
    mask = torch.zeros(len(ids), width, dtype=torch.int64)
    for row, one in enumerate(ids):
        padded[row, width - len(one) :], mask[row, width - len(one) :] = one, 1
    # transformers' own annotations know of no callable's results.
    generate: Any = model.generate
    made: list[list[Candidate]] = generate(
        input_ids=padded, attention_mask=mask, generation_config=config, custom_generate=grow
    )
    return made


def prompt_of(
    text: str,
    token_ids: tuple[int, ...],
    runners: Sequence[Runner],
    tokenizer: Any,
    decoders: Sequence[Decoder],
    wanted: Wanted,
    cost: Cost,
) -> Prompt:
    """What decoders begin from, for one text."""
    runner = runners[0]
    return Prompt(
        text=text,
        token_ids=token_ids,
        facts=runner.facts,
        max_new_tokens=wanted.max_new_tokens,
        temperature=wanted.temperature,
        probe=ModelProbe(runner.model, runner.facts, runner.steerer, cost),
        encode=lambda words: tuple(encode_text(words, tokenizer, begin=False)),
        decode=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
        calibration=_calibration(decoders, wanted, runner),
        verify=None if wanted.verifier is None else checked(wanted.verifier),
        num_models=len(runners),
    )


def _calibration(decoders: Sequence[Decoder], wanted: Wanted, runner: Runner) -> Calibration | None:
    needing = [one for one in decoders if "needs:calibration" in tags_of([one])]
    if not needing:
        return None
    if len(needing) > 1 or len(wanted.calibrations) > 1:
        raise UserError("only one of several decoders may read a calibration")
    return load_calibration(Path(wanted.calibrations[0]), name_of(needing[0]), runner.facts)


def checked(verifier: Verifier) -> Verifier:
    """A verifier whose failures and whose scores that are no numbers are told as errors of the user's."""

    def verify(prompt: str, texts: Sequence[str]) -> Sequence[float]:
        try:
            scores = [float(one) for one in verifier(prompt, texts)]
        except Exception as error:
            raise UserError(
                f"the verifier failed ({type(error).__name__}: {error}); it takes a prompt and a list of "
                "texts and returns a number for each"
            ) from error
        if not all(map(math.isfinite, scores)):
            raise UserError(f"the verifier gave {scores}; every score must be a finite number")
        return scores

    return verify


def _result(
    decoder: Decoder, prompt: Prompt, group: Sequence[Candidate], cost: Cost, clock: Clock
) -> Decoded:
    chosen = decoder.select(group) if len(group) > 1 else 0
    grown = tuple(
        Grown(
            text=one.text,
            token_ids=tuple(one.token_ids),
            verdict=one.verdicts[-1] if one.verdicts else None,
        )
        for one in group
    )
    return Decoded(
        text=grown[chosen].text,
        token_ids=grown[chosen].token_ids,
        num_prompt_tokens=len(prompt.token_ids),
        branches=grown,
        chosen=chosen,
        cost=cost,
        prefill_ms=clock.prefill_ms,
        decode_ms=clock.decode_ms,
    )
