"""What a written checkpoint loses beside its source, both read from disk layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import final

from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.fitting.clock import Progress, watched
from mixtura.fitting.journal import Journal
from mixtura.fitting.quality import HeldOut, Scores, summarise
from mixtura.fitting.records import Quality
from mixtura.fitting.scoring import own_scores, scores_beside
from mixtura.running.stream import DEFAULT_WORKING_BYTES, Streamed

Notify = Callable[[str], None]

_REFERENCE, _BEFORE, _AFTER = "reference.safetensors", "before", "after"


@final
class Measure:
    """Measures a checkpoint that is written beside its source, on held-out text.

    The source's final states are kept, and made into logits beside the other's by its own head, chunk by
    chunk: what is compressed are experts, so both have the same head.

    Args:
        held_out: the text.
        journal: where states and numbers are kept.
        seed: of the interval of the loss.
        notify: told what is being measured.
    """

    def __init__(self, held_out: tuple[HeldOut, ...], journal: Journal, seed: int, notify: Notify) -> None:
        self._held_out = held_out
        self._journal = journal
        self._seed = seed
        self._notify = notify

    def before(self, source: CheckpointView) -> Quality:
        """The source itself: no loss, its perplexity and its exact answers."""
        if _BEFORE not in self._journal.notes():
            states: dict[str, Tensor] = {}

            def of_part(streamed: Streamed, number: int, text: HeldOut) -> Scores:
                scores, states[str(number)] = own_scores(streamed, text)
                return scores

            quality = self._scored(Streamed(source), "the original on held-out text", of_part)

            def save(aside: Path) -> None:
                save_file(states, str(aside))

            self._journal.write(_REFERENCE, save)
            self._journal.note(_BEFORE, asdict(quality))
        return Quality(**self._journal.notes()[_BEFORE])

    def after(self, written: Path) -> Quality:
        """What was written, beside the source; `before` comes first."""
        return self.streamed(lambda: Streamed(open_checkpoint(written)), "what was written, on held-out text")

    def streamed(self, changed: Callable[[], Streamed], what: str) -> Quality:
        """A model that is changed as it is read, beside the source; `before` comes first."""
        if _AFTER not in self._journal.notes():
            states = load_file(str(self._journal.path(_REFERENCE)))

            def of_part(streamed: Streamed, number: int, text: HeldOut) -> Scores:
                return scores_beside(streamed, text, states[str(number)])

            quality = self._scored(changed(), what, of_part)
            self._journal.note(_AFTER, asdict(quality))
        return Quality(**self._journal.notes()[_AFTER])

    def _scored(
        self, streamed: Streamed, what: str, of_part: Callable[[Streamed, int, HeldOut], Scores]
    ) -> Quality:
        self._notify(f"measuring {what}")
        started = time.monotonic()
        shapes = (text.input_ids.shape for text in self._held_out)
        batches = sum(
            len(list(streamed.batches(*shape, max_bytes=DEFAULT_WORKING_BYTES))) for shape in shapes
        )
        progress = Progress(f"measuring {what}", batches * len(streamed.view.layers), self._notify)
        with watched(streamed, progress, None):
            scored = [(of_part(streamed, number, text), text) for number, text in enumerate(self._held_out)]
        return summarise(scored, time.monotonic() - started, self._seed)
