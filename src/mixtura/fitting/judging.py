"""Measuring candidates: the model as it would be, streamed from the original's files."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.fitting.candidates import choice_bytes
from mixtura.fitting.clock import Clock, Notify, Progress, watched
from mixtura.fitting.depth import keeps_rounded
from mixtura.fitting.journal import Journal
from mixtura.fitting.palette import DROP, KEEP
from mixtura.fitting.quality import HeldOut, summarise
from mixtura.fitting.records import Candidate, Measured, Prices, Quality
from mixtura.fitting.rest import Rest
from mixtura.fitting.rounding import Rounder
from mixtura.fitting.scoring import own_scores, scores_beside
from mixtura.fitting.search import OutOfTimeError
from mixtura.kernels import ExpertTensors
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
        view: the original on disk.
        held_out: the text to judge by.
        journal: where the reference and the measurements are kept.
        rounder: gives experts in fewer bits.
        clock: looked at between layers, but for the first candidate.
        rest: what candidates may store in 8 bits besides experts.
        notify: told what is being measured.
    """

    def __init__(
        self,
        view: CheckpointView,
        held_out: tuple[HeldOut, ...],
        journal: Journal,
        rounder: Rounder,
        *,
        clock: Clock,
        seed: int,
        notify: Notify,
        rest: Rest | None = None,
    ) -> None:
        self.view = view
        self._held_out = held_out
        self._journal = journal
        self._rounder = rounder
        self._clock = clock
        self._seed = seed
        self._notify = notify
        self._rest = rest or Rest()
        self._has_been_asked = False
        self._pass_s = 0.0
        self._states = self._reference()
        self._notes = journal.notes()
        self._sizes: _Sizes | None = None
        # Candidates share most of their experts, and rounding them takes a third of a measurement.
        self._rounded: dict[tuple[int, int, int], ExpertTensors] = {}
        self._keeps_rounded = keeps_rounded(view)

    def original(self) -> Quality:
        """The original itself: KL 0, its perplexity and its exact answers."""
        return Quality(**self._notes[_ORIGINAL])

    def price_with(self, prices: Prices, fixed_bytes: int, dense_active_bytes: float) -> None:
        """What `measure` needs to say what a candidate takes.

        Args:
            prices: bytes of every option, and the experts' load.
            fixed_bytes: account of a model without its routed experts.
            dense_active_bytes: bytes a token reads outside the routed experts.
        """
        self._sizes = _Sizes(prices, fixed_bytes, dense_active_bytes, self._rest)

    def measure(self, candidate: Candidate) -> Measured:
        """A candidate's loss and what it takes.

        Raises:
            OutOfTimeError: the time is over, or would be before the candidate is measured; it is not the
                first one, and the journal does not know it.
        """
        assert self._sizes is not None
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
            expert_bytes=choice_bytes(self._sizes.prices, candidate.choice),
            account_bytes=self._sizes.account(candidate),
            active_bytes=self._sizes.active(candidate),
            quality=quality,
        )
        if noted is None:
            self._journal.note(candidate.key, measured.to_dict())
        return measured

    def _streamed(self, candidate: Candidate) -> Streamed:
        """The candidate, from the original's files: experts are rounded as they are read."""
        assert self._sizes is not None
        experts = self._sizes.prices.experts
        options = {
            (int(layer), int(number)): option
            for layer, number, option in zip(experts.layers, experts.numbers, candidate.choice, strict=True)
        }

        ways: dict[int, dict[int, tuple[int, ...]]] = {}
        for (layer, number), option in options.items():
            if option not in (KEEP, DROP):
                ways.setdefault(layer, {})[number] = (option,)

        def instead(layer: int, expert: int, dtype: torch.dtype) -> ExpertTensors | None:
            option = options[layer, expert]
            if option in (KEEP, DROP):
                return None
            # All of a layer at once, side by side, when the first of them is asked for.
            self._rounder.ensure(layer, ways.pop(layer, {}))
            known = self._rounded.get((layer, expert, option))
            if known is None:
                known = self._rounder.decoded(layer, expert, option, dtype)
                if self._keeps_rounded:
                    self._rounded[layer, expert, option] = known
            return known

        dropped: dict[int, list[int]] = {}
        for (layer, number), option in options.items():
            if option == DROP:
                dropped.setdefault(layer, []).append(number)
        changed = self._rest.changed if candidate.packs_rest else None
        return Streamed(self.view, instead, dropped=dropped, changed=changed)

    def _judge(self, candidate: Candidate, clock: Clock | None) -> Quality:
        started = time.monotonic()
        streamed = self._streamed(candidate)
        with watched(streamed, self._progress(streamed, candidate.label), clock):
            scored = [
                (scores_beside(streamed, text, states), text)
                for text, states in zip(self._held_out, self._states, strict=True)
            ]
        # What a candidate took is what the next one will take, about.
        self._pass_s = _SHARE_OF_PASS * (time.monotonic() - started)
        return summarise(scored, time.monotonic() - started, self._seed)

    def _progress(self, streamed: Streamed, what: str) -> Progress:
        """Counts the layers of all parts of the text."""
        shapes = (text.input_ids.shape for text in self._held_out)
        num_batches = sum(
            len(list(streamed.batches(*shape, max_bytes=DEFAULT_WORKING_BYTES))) for shape in shapes
        )
        return Progress(what, num_batches * len(self.view.layers), self._notify)

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
        streamed = Streamed(self.view)
        states: dict[str, Tensor] = {}
        scored = []
        with watched(streamed, self._progress(streamed, what), None):
            for number, text in enumerate(self._held_out):
                scores, states[str(number)] = own_scores(streamed, text)
                scored.append((scores, text))

        def save(aside: Path) -> None:
            save_file(states, str(aside))

        self._journal.write(_REFERENCE, save)
        self._journal.note(_ORIGINAL, asdict(summarise(scored, time.monotonic() - started, self._seed)))


@final
class _Sizes:
    """What a candidate takes, from the sizes of its experts."""

    def __init__(self, prices: Prices, fixed_bytes: int, dense_active_bytes: float, rest: Rest) -> None:
        self.prices = prices
        self._rest = rest
        self._dense = dense_active_bytes
        self._fixed = fixed_bytes

    def account(self, candidate: Candidate) -> int:
        saved = self._rest.saved_bytes if candidate.packs_rest else 0
        return self._fixed - saved + choice_bytes(self.prices, candidate.choice)

    def active(self, candidate: Candidate) -> float:
        """Bytes a token reads on average: dense weights, and each layer's experts by their load."""
        chosen = np.asarray(candidate.choice)
        sizes = self.prices.num_bytes[np.arange(len(chosen)), chosen]
        total = self._dense - (self._rest.saved_active_bytes if candidate.packs_rest else 0.0)
        for layer, top_k in self.prices.experts.top_k.items():
            here = self.prices.experts.of_layer(layer) & (chosen != DROP)
            load: Float[ndarray, " M"] = self.prices.load[here].astype(float) + 1e-9
            total += top_k * float((sizes[here] * load).sum() / load.sum())
        return total
