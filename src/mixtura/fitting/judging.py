"""Measuring candidates: the model as it would be, streamed from the original's files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.fitting.candidates import choice_bytes
from mixtura.fitting.journal import Journal
from mixtura.fitting.pricing import requantized, width_quantizers
from mixtura.fitting.quality import HeldOut, Scores, join, score_chunk, summarise
from mixtura.fitting.records import DROP, KEEP, WIDTHS, Candidate, Measured, Prices, Quality
from mixtura.fitting.search import OutOfTimeError
from mixtura.kernels import ExpertTensors
from mixtura.running.stream import Streamed

_REFERENCE = "reference.safetensors"
# Only of models so small that this is less than PyTorch itself takes are rounded experts kept.
_MOST_ROUNDED_BYTES = 256 << 20


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
        deadline: when to raise `OutOfTimeError` instead of measuring a second candidate, in
            `time.monotonic` seconds.
        notify: told what is being measured.
    """

    def __init__(
        self,
        view: CheckpointView,
        held_out: tuple[HeldOut, ...],
        journal: Journal,
        *,
        deadline: float,
        seed: int,
        notify: Callable[[str], None],
    ) -> None:
        self.view = view
        self._held_out = held_out
        self._journal = journal
        self._deadline = deadline
        self._seed = seed
        self._notify = notify
        self._notes = journal.notes()
        self._has_measured = False
        self._states = self._reference()
        self._sizes: _Sizes | None = None
        # Candidates share most of their experts, and rounding them takes a third of a measurement.
        self._rounded: dict[tuple[int, int, int], ExpertTensors] = {}
        self._keeps_rounded = len(WIDTHS) * view.num_bytes <= _MOST_ROUNDED_BYTES

    def original(self) -> Quality:
        """The original itself: KL 0, its perplexity and its exact answers."""
        noted = self._notes.get("original")
        if noted is None:
            quality = self._judge(Streamed(self.view))
            noted = asdict(quality)
            self._journal.note("original", noted)
        return Quality(**noted)

    def price_with(self, prices: Prices, fixed_bytes: int, dense_active_bytes: float) -> None:
        """What `measure` needs to say what a candidate takes.

        Args:
            prices: bytes of every option, and the experts' load.
            fixed_bytes: account of a model without its routed experts.
            dense_active_bytes: bytes a token reads outside the routed experts.
        """
        self._sizes = _Sizes(prices, fixed_bytes, dense_active_bytes)

    def measure(self, candidate: Candidate) -> Measured:
        """A candidate's loss and what it takes.

        Raises:
            OutOfTimeError: the deadline has passed, another candidate has been measured, and the journal
                does not know this one.
        """
        assert self._sizes is not None
        noted = self._notes.get(candidate.key)
        if noted is not None:
            return Measured.from_dict(noted)
        # The first candidate, the plain plan, is measured however little time there is.
        if self._has_measured and time.monotonic() > self._deadline:
            raise OutOfTimeError
        self._notify(candidate.label)
        quality = self._judge(self._streamed(candidate))
        measured = Measured(
            candidate=candidate,
            expert_bytes=choice_bytes(self._sizes.prices, candidate.choice),
            account_bytes=self._sizes.account(candidate),
            active_bytes=self._sizes.active(candidate),
            quality=quality,
        )
        self._journal.note(candidate.key, measured.to_dict())
        self._has_measured = True
        return measured

    def _streamed(self, candidate: Candidate) -> Streamed:
        """The candidate, from the original's files: experts are rounded as they are read."""
        assert self._sizes is not None
        experts = self._sizes.prices.experts
        options = {
            (int(layer), int(number)): option
            for layer, number, option in zip(experts.layers, experts.numbers, candidate.choice, strict=True)
        }
        transposed = {layer.index: layer.layout.transposed for layer in self.view.layers}
        quantizers = width_quantizers()

        def transform(layer: int, expert: int, tensors: ExpertTensors) -> ExpertTensors:
            option = options[layer, expert]
            if option in (KEEP, DROP):
                return tensors
            known = self._rounded.get((layer, expert, option))
            if known is None:
                known = requantized(tensors, quantizers[option], transposed=transposed[layer])
                if self._keeps_rounded:
                    self._rounded[layer, expert, option] = known
            return known

        dropped: dict[int, list[int]] = {}
        for (layer, number), option in options.items():
            if option == DROP:
                dropped.setdefault(layer, []).append(number)
        return Streamed(self.view, transform, dropped=dropped)

    def _judge(self, streamed: Streamed) -> Quality:
        started = time.monotonic()
        scored = [
            (self._scores(streamed, text, states), text)
            for text, states in zip(self._held_out, self._states, strict=True)
        ]
        return summarise(scored, time.monotonic() - started, self._seed)

    def _scores(self, streamed: Streamed, text: HeldOut, states: Float[Tensor, "S T D"]) -> Scores:
        targets = text.input_ids.roll(-1, 1).reshape(-1)
        chunks: list[Scores] = []

        def on_both(logits: Tensor, reference: Tensor, positions: Tensor) -> None:
            chunks.append(score_chunk(reference, logits, targets[positions]))

        streamed.run_beside(
            text.input_ids, text.attention_mask, beside=states, on_both=on_both, wanted=text.predicted
        )
        return join(chunks)

    def _reference(self) -> list[Tensor]:
        """The original's final states on the held-out text, from the journal if it has them."""
        path = self._journal.path(_REFERENCE)
        if not path.is_file():
            self._notify("the original on held-out text")
            streamed = Streamed(self.view)
            states = {
                str(number): streamed.hidden(text.input_ids, text.attention_mask).contiguous()
                for number, text in enumerate(self._held_out)
            }

            def save(aside: Path) -> None:
                save_file(states, str(aside))

            self._journal.write(_REFERENCE, save)
        loaded = load_file(str(path))
        return [loaded[str(number)] for number in range(len(self._held_out))]


@final
class _Sizes:
    """What a candidate takes, from the sizes of its experts."""

    def __init__(self, prices: Prices, fixed_bytes: int, dense_active_bytes: float) -> None:
        self.prices = prices
        self._dense = dense_active_bytes
        self._fixed = fixed_bytes

    def account(self, candidate: Candidate) -> int:
        return self._fixed + choice_bytes(self.prices, candidate.choice)

    def active(self, candidate: Candidate) -> float:
        """Bytes a token reads on average: dense weights, and each layer's experts by their load."""
        chosen = np.asarray(candidate.choice)
        sizes = self.prices.num_bytes[np.arange(len(chosen)), chosen]
        total = self._dense
        for layer, top_k in self.prices.experts.top_k.items():
            here = self.prices.experts.of_layer(layer) & (chosen != DROP)
            load: Float[ndarray, " M"] = self.prices.load[here].astype(float) + 1e-9
            total += top_k * float((sizes[here] * load).sum() / load.sum())
        return total
