"""Decoders in the engine: those that go token by token, each over the texts of its own requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.data.tokens import encode_text
from mixtura.errors import UserError
from mixtura.methods.decoders import Branch, Calibration, Candidate, Decoder, ModelFacts, Prompt, View
from mixtura.rerouting.core import Rerouting
from mixtura.running.decoders.bundle import Cost, has_state
from mixtura.running.decoders.composing import ALONE, composed, name_of, parts_of, tags_of
from mixtura.running.decoders.facts import facts_of, steered
from mixtura.running.decoders.probing import ModelProbe, load_calibration
from mixtura.running.decoders.skipping import shortened
from mixtura.running.decoders.steering import Steerer, stacked
from mixtura.running.decoders.stepping import Stepping
from mixtura.running.generation import reserved_cache
from mixtura.serving.engine.lanes import Lane
from mixtura.serving.engine.records import Adapters, Asked
from mixtura.types.steering import Steering

_Made = TypeVar("_Made")
# What a request of several texts, of further models, of a verifier or of gradients would need.
_REFUSED: Final = {
    "several": "grows several texts, of which one is chosen when all are complete",
    "searches": "drops texts while they grow",
    "needs:verifier": "needs a verifier",
    "needs:models": "runs several models",
    "exits": "decides layer by layer, for one text at a time",
    "reads:gradients": "computes gradients while it decodes",
    "reads:confidence": "reads the probabilities of tokens drawn before",
}
_DOING: Final = {
    "soften": "goes on from means of several tokens' embeddings",
    "force": "puts in words of its own",
    "revise": "reads texts anew as they grow",
}


def require_served(decoders: Sequence[Decoder]) -> Decoder:
    """One decoder of several, if it can run in an engine's steps.

    Raises:
        UserError: it cannot, with the reason; or two of them cannot be combined.
    """
    tags = tags_of(decoders)
    name = " and ".join(name_of(one) for one in decoders)
    why = next((said for tag, said in _REFUSED.items() if tag in tags), None)
    changed = [
        one for one in ALONE if any(getattr(type(d), one) is not getattr(Decoder, one) for d in decoders)
    ]
    if why is None and changed:
        why = _DOING.get(changed[0], "chooses among texts that grow side by side")
    if why is not None:
        raise UserError(
            f"{name} {why}, which cannot be answered token by token beside other requests; use 'mixtura "
            "generate --decoder' for it, or a decoder such as scmoe here"
        )
    return composed(decoders)


@final
class Decider:
    """A decoder over one text of the engine.

    Attributes:
        views: the ways that the model runs on the text.
        temperature: of the draws; None for what was asked for.
    """

    def __init__(self, decoder: Decoder, prompt: Prompt, branch: Branch) -> None:
        self.views = branch.views
        self.temperature = branch.temperature
        self._decoder = decoder
        self._candidate = Candidate(prompt=prompt, branch=branch)

    def mixed(self, logits: Sequence[Float[Tensor, " V"]]) -> Float[Tensor, " V"]:
        """What to pick the next token from, of what each view says."""
        whole = torch.stack([one.detach().to("cpu", torch.float32) for one in logits])
        return self._decoder.mix(whole[None], [self._candidate])[0]

    def take(self, token: int) -> None:
        """A token was picked."""
        self._candidate.token_ids.append(token)


@final
class Steers:
    """What decoders of an engine share: the seats of the model's routers, and how passes are steered.

    Nothing of the model is changed before the first text is steered, nor while none is.

    Args:
        model: the engine's.
        tokenizer: its.
        calibrations: files that decoders read, each of which says whose it is.
        adapters: on the model, of which texts choose.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        calibrations: Sequence[Path] = (),
        adapters: Adapters | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._files = tuple(calibrations)
        self._adapters = adapters
        # By adapter, as one may have routers of its own.
        self._known: dict[str | None, ModelFacts] = {}
        self._calibrations: dict[tuple[str | None, str], Calibration] = {}
        self._seats: Rerouting | None = None
        self._steerer: Steerer | None = None
        self._stepping: Stepping | None = None
        self._stacked: tuple[tuple[View, ...], dict[int, Steering]] = (), {}

    def open(self, asked: Asked, default_temperature: float) -> Decider:
        """A text's decoder, which may run the model on its prompt.

        Raises:
            UserError: the model does not suit it, or it lacks what it needs.
        """
        decoder = asked.decoder
        assert decoder is not None
        parts = parts_of(decoder)
        self._prepare(parts)
        facts = self._facts(asked.adapter)
        wanted = asked.sampling.temperature
        prompt = Prompt(
            text=str(self._tokenizer.decode(list(asked.prompt))),
            token_ids=asked.prompt,
            facts=facts,
            max_new_tokens=asked.max_new_tokens,
            temperature=default_temperature if wanted is None else wanted,
            probe=ModelProbe(self._model, facts, self._steerer, Cost()),
            encode=lambda words: tuple(encode_text(words, self._tokenizer, begin=False)),
            decode=lambda tokens: str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)),
            calibration=self._calibration(parts, asked.adapter),
        )
        branch, *more = decoder.open(prompt)
        name = " and ".join(name_of(one) for one in parts)
        if more or branch.forced:
            what = "grows several texts" if more else "begins answers with words of its own"
            raise UserError(f"{name} {what}, which cannot be answered token by token; choose another decoder")
        if any(view.skipped for view in branch.views):
            self._require_skipping(name)
        return Decider(decoder, prompt, branch)

    def ready(self, decoders: Sequence[Decoder]) -> None:
        """Prepare the model to be steered, where one of the decoders steers, with every adapter.

        Raises:
            UnsupportedModelError: the model is dense, or of a family that cannot be steered.
            UserError: a calibration is missing.
        """
        self._prepare(decoders)
        for name in (None, *(() if self._adapters is None else self._adapters.names)):
            self._calibration(decoders, name)

    def _prepare(self, decoders: Sequence[Decoder]) -> None:
        if self._steerer is not None or "steers" not in tags_of(decoders):
            return
        self._choose(None)
        self._known.clear()
        found = self._seats = steered(self._model)
        try:
            facts = self._facts(None)
            if not facts.layers:
                raise UserError("a table of token ids chooses the experts, so that none can be steered")
            self._steerer = Steerer(found)
            self._stepping = Stepping(self._model, facts, self._steerer)
        except BaseException:
            found.restore()
            self._known.clear()
            self._seats = self._steerer = None
            raise
        self.rest()

    def _choose(self, adapter: str | None) -> None:
        if self._adapters is not None:
            self._adapters.choose([adapter])

    def _facts(self, adapter: str | None) -> ModelFacts:
        """What is known of the model with an adapter, which passes run with until another is chosen."""
        self._choose(adapter)
        if adapter not in self._known:
            self._known[adapter] = facts_of(self._model, self._seats)
        return self._known[adapter]

    def _calibration(self, decoders: Sequence[Decoder], adapter: str | None) -> Calibration | None:
        """That of the one decoder that reads one, made for the model with an adapter."""
        needing = [one for one in decoders if "needs:calibration" in tags_of([one])]
        if not needing:
            return None
        if len(needing) > 1:
            raise UserError("only one of several decoders may read a calibration")
        name = name_of(needing[0])
        key = adapter, name
        if key not in self._calibrations:
            said = f"{name} needs a calibration, which this server was not given"
            for path in self._files:
                try:
                    self._calibrations[key] = load_calibration(path, name, self._facts(adapter))
                except UserError as error:
                    said = str(error)
            if key not in self._calibrations:
                whose = "" if adapter is None else f", of the model that {adapter} was merged into,"
                raise UserError(
                    f"{said}; make one by 'mixtura calibrate {name} MODEL --out FILE'{whose} and start the "
                    "server with --calibration FILE"
                )
        return self._calibrations[key]

    def _require_skipping(self, name: str) -> None:
        cache = reserved_cache(self._model, 1)
        if cache is None or any(map(has_state, cache.layers)):
            raise UserError(
                f"{name} skips layers, whose places in a cache that keeps states nothing can fill; choose "
                "another decoder"
            )

    def read(self, forward: Callable[[], _Made], lane: Lane, num_tokens: int, *, is_last: bool) -> _Made:
        """A pass over a part of a prompt."""
        if self._stepping is None:
            return forward()
        made: Mapping[int, Steering] = {}
        if lane.view.steering:
            made = stacked(self._known[None], [lane.view], num_tokens, prefill=True, last=is_last)
        return self._stepping.read(forward, made)

    def step(self, forward: Callable[[], _Made], lanes: Sequence[Lane]) -> _Made:
        """A pass over a token of each of some texts."""
        views = tuple(lane.view for lane in lanes)
        skipped = views[0].skipped if len(views) == 1 else frozenset()
        skipping = shortened(self._model, skipped) if skipped else nullcontext()
        with skipping:
            if self._stepping is None:
                return forward()
            if not any(view.steering for view in views):
                return self._stepping.step(forward, {}, len(views))
            if len(views) != len(self._stacked[0]) or any(
                a is not b for a, b in zip(views, self._stacked[0], strict=True)
            ):
                self._stacked = views, stacked(self._known[None], views, 1, prefill=False, last=True)
            if skipped:
                return self._stepping.read(forward, self._stacked[1])
            return self._stepping.step(forward, self._stacked[1], len(views))

    def rest(self) -> None:
        """No text is steered now: the model is as it was."""
        self._stacked = (), {}
        if self._steerer is not None:
            self._steerer.stand_by()
