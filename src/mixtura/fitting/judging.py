"""Measuring candidates: the model as it would be, streamed from the original's files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import final

from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtura.fitting.candidates import choice_bytes
from mixtura.fitting.clock import Clock, Notify, Progress, watched
from mixtura.fitting.forms.base import Form
from mixtura.fitting.journal import Journal
from mixtura.fitting.quality import HeldOut, summarise
from mixtura.fitting.records import Candidate, Measured, Quality
from mixtura.fitting.scoring import own_scores, scores_beside
from mixtura.fitting.search import OutOfTimeError
from mixtura.running.stream import DEFAULT_WORKING_BYTES, Streamed

_REFERENCE, _ORIGINAL = "reference.safetensors", "original"
# Of the time the last candidate took, what must be left for another to be begun.
_SHARE_OF_PASS = 0.8


@final
class Judge:
    """Measures how far candidates are from the original on held-out text.

    The original's final states are kept, so that its logits can be made again chunk by chunk beside
    a candidate's; no more than one chunk of either exists at a time. Every measurement goes through
    the journal.

    Args:
        form: makes candidates of the original, and says what they take.
        held_out: the text to judge by.
        journal: where the reference and the measurements are kept.
        clock: looked at between layers, but for the first candidate.
        notify: told what is being measured.
        shares: by domain, its share of the loss; see `mixtura.fitting.quality.summarise`.
    """

    def __init__(
        self,
        form: Form,
        held_out: tuple[HeldOut, ...],
        journal: Journal,
        *,
        clock: Clock,
        seed: int,
        notify: Notify,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        self._form = form
        self._held_out = held_out
        self._journal = journal
        self._clock = clock
        self._seed = seed
        self._notify = notify
        self._shares = shares
        self._has_been_asked = False
        self._pass_s = 0.0
        self._states = self._reference()
        self._notes = journal.notes()

    def original(self) -> Quality:
        """The original itself: KL 0, its perplexity and its exact answers."""
        return Quality(**self._notes[_ORIGINAL])

    def measure(self, candidate: Candidate) -> Measured:
        """A candidate's loss and what it takes.

        Raises:
            OutOfTimeError: the time is over, or would be before the candidate is measured; it is not the
                first one, and the journal does not know it.
        """
        # The first candidate, the plain plan, is measured however little time there is.
        is_needed, self._has_been_asked = not self._has_been_asked, True
        noted = self._notes.get(candidate.key)
        if noted is not None:
            quality = Measured.from_dict(noted).quality
        else:
            if not is_needed and self._clock.left_s < self._pass_s:
                raise OutOfTimeError
            self._notify(candidate.label)
            quality = self._judge(candidate, None if is_needed else self._clock)
        measured = Measured(
            candidate=candidate,
            expert_bytes=choice_bytes(self._form.prices, candidate.choice),
            account_bytes=self._form.account_bytes(candidate),
            active_bytes=self._form.active_bytes(candidate),
            quality=quality,
        )
        if noted is None:
            self._journal.note(candidate.key, measured.to_dict())
        return measured

    def _judge(self, candidate: Candidate, clock: Clock | None) -> Quality:
        started = time.monotonic()
        streamed = self._form.streamed(candidate)
        with watched(streamed, self._progress(streamed, candidate.label), clock):
            scored = [
                (scores_beside(streamed, text, states), text)
                for text, states in zip(self._held_out, self._states, strict=True)
            ]
        # What a candidate took is what the next one will take, about.
        self._pass_s = _SHARE_OF_PASS * (time.monotonic() - started)
        return summarise(scored, time.monotonic() - started, self._seed, self._shares)

    def _progress(self, streamed: Streamed, what: str) -> Progress:
        """Counts the layers of all parts of the text."""
        shapes = (text.input_ids.shape for text in self._held_out)
        num_batches = sum(
            len(list(streamed.batches(*shape, max_bytes=DEFAULT_WORKING_BYTES))) for shape in shapes
        )
        return Progress(what, num_batches * len(self._form.view.layers), self._notify)

    def _reference(self) -> list[Tensor]:
        """The original's final states on the held-out text, from the journal if it has them."""
        path = self._journal.path(_REFERENCE)
        if not path.is_file() or _ORIGINAL not in self._journal.notes():
            self._measure_original()
        loaded = load_file(str(path))
        return [loaded[str(number)] for number in range(len(self._held_out))]

    def _measure_original(self) -> None:
        """Run the original once, for its states and for what it scores beside itself."""
        what = "the original on held-out text"
        self._notify(what)
        started = time.monotonic()
        streamed = self._form.original()
        states: dict[str, Tensor] = {}
        scored = []
        with watched(streamed, self._progress(streamed, what), None):
            for number, text in enumerate(self._held_out):
                scores, states[str(number)] = own_scores(streamed, text)
                scored.append((scores, text))

        def save(aside: Path) -> None:
            save_file(states, str(aside))

        self._journal.write(_REFERENCE, save)
        self._journal.note(
            _ORIGINAL, asdict(summarise(scored, time.monotonic() - started, self._seed, self._shares))
        )
