"""The one pass over calibration text that a fit makes: every expert's prices and importance.

Each MoE layer that is done is kept in the journal, with what its experts put out, so that a stopped fit
runs through the layers it has seen without reading their experts and goes on where it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.data.tokens import TokenBatch
from mixtura.fitting.clock import Clock, Progress, watched
from mixtura.fitting.depth import Depth
from mixtura.fitting.journal import Journal
from mixtura.fitting.pricing import (
    LayerPricer,
    collect_importance,
    collect_prices,
    load_prices,
    save_prices,
)
from mixtura.fitting.records import Observed
from mixtura.fitting.rounding import Rounder
from mixtura.fitting.search import OutOfTimeError
from mixtura.fitting.texts import Texts, as_batch
from mixtura.running.observing.attach import attached
from mixtura.running.observing.recorder import Cursor
from mixtura.running.stream import DEFAULT_WORKING_BYTES, Streamed

_PRICES, _LAYER = "prices.safetensors", "observed-{batch}-{layer}-{call}.safetensors"
_UNSEEN = "observed"
# Of a fit's time, what observing may take: then it looks at fewer experts, and a little later it stops.
_HURRY_SHARE, _STOP_SHARE = 0.7, 0.8
_PRICED_IN_HURRY = 2


def observed(
    view: CheckpointView,
    texts: Texts,
    depth: Depth,
    journal: Journal,
    rounder: Rounder,
    *,
    clock: Clock,
    notify: Callable[[str], None],
) -> Observed:
    """Observe the original on the calibration text and price every option of every expert.

    All of it comes from the journal if an earlier run has kept it.
    """
    if not journal.path(_PRICES).is_file():
        observer = _Observer(view, depth, journal, rounder, clock, notify)
        observer.run(as_batch(texts.calibration))
        prices, importance = collect_prices(observer.pricers), collect_importance(observer.pricers)
        unseen = sum(not pricer.num_tokens[0] for pricer in observer.pricers)
        journal.note(_UNSEEN, {"num_unseen_layers": unseen})

        def save(path: Path) -> None:
            save_prices(prices, importance, path)

        journal.write(_PRICES, save)
        observer.forget()
    prices, importance = load_prices(journal.path(_PRICES))
    return Observed(prices, importance, journal.notes()[_UNSEEN]["num_unseen_layers"])


def forget_prices(journal: Journal) -> None:
    """Have experts priced anew, by what is kept of them and more."""
    journal.path(_PRICES).unlink(missing_ok=True)


@final
class _Observer:
    """Runs the original with a pricer on every MoE layer, from the journal as far as that goes."""

    def __init__(
        self,
        view: CheckpointView,
        depth: Depth,
        journal: Journal,
        rounder: Rounder,
        clock: Clock,
        notify: Callable[[str], None],
    ) -> None:
        self._view = view
        self._journal = journal
        self._clock = clock
        self._notify = notify
        self._depth = depth
        self._streamed = Streamed(view)
        # A module may run more than once in a pass.
        self._batch, self._calls = 0, Counter[int]()
        self._modules: list[Any] = [self._streamed.model.get_submodule(layer.name) for layer in view.layers]
        self.pricers = [
            LayerPricer(layer, rounder, depth.priced_experts, depth.stored) for layer in view.layers
        ]

    def run(self, tokens: TokenBatch) -> None:
        """Observe all of the text, or what the time allows of it."""
        cursor = Cursor()
        observers = {pricer.layer.name: pricer for pricer in self.pricers}
        batches = list(self._streamed.batches(*tokens.input_ids.shape, max_bytes=DEFAULT_WORKING_BYTES))
        what = "observing and pricing every expert"
        self._notify(what)
        progress = Progress(what, len(batches) * len(self.pricers), self._notify)
        with attached(self._streamed.model, observers, cursor), self._journalled():
            for self._batch, rows in enumerate(batches):
                self._calls.clear()
                for pricer in self.pricers:
                    pricer.is_last = self._batch + 1 == len(batches)
                valid = tokens.attention_mask[rows].bool()
                cursor.move(valid.reshape(-1), tokens.domains[rows, None].expand_as(valid).reshape(-1))
                try:
                    with watched(self._streamed, progress, self._clock_of_observing()):
                        self._streamed.hidden(tokens.input_ids[rows], tokens.attention_mask[rows])
                except OutOfTimeError:
                    return

    def forget(self) -> None:
        """Remove what was kept of single layers."""
        for path in self._journal.directory.glob(_LAYER.format(batch="*", layer="*", call="*")):
            path.unlink()

    def _clock_of_observing(self) -> Clock:
        return Clock(self._clock.started, _STOP_SHARE * self._clock.limit_s)

    @contextmanager
    def _journalled(self) -> Iterator[None]:
        """Let each experts module keep what it did, and do from the journal what it did before."""
        for number, module in enumerate(self._modules):
            module.forward = self._forward_of(number, module.forward)
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward

    def _forward_of(self, number: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run_once(*args: Any, **kwargs: Any) -> Tensor:
            call = self._calls[number]
            self._calls[number] += 1
            path = self._journal.path(_LAYER.format(batch=self._batch, layer=number, call=call))
            if path.is_file():
                return self._recall(number, path)
            if self._clock.elapsed_s > _HURRY_SHARE * self._clock.limit_s:
                self.pricers[number].price_only(_PRICED_IN_HURRY)
            self.pricers[number].part = f"{self._batch:04}-{call:04}"
            outputs = forward(*args, **kwargs)
            self._keep(number, path.name, outputs)
            return outputs

        return run_once

    def _keep(self, number: int, name: str, outputs: Tensor) -> None:
        kept = {key: torch.from_numpy(value) for key, value in self.pricers[number].snapshot().items()}
        kept["outputs"] = outputs.contiguous()

        def save(path: Path) -> None:
            save_file(kept, str(path))

        self._journal.write(name, save)

    def _recall(self, number: int, path: Path) -> Tensor:
        with safe_open(str(path), framework="pt") as file:
            outputs = file.get_tensor("outputs")
            names = [name for name in file.keys() if name != "outputs"]  # noqa: SIM118
            self.pricers[number].restore({name: file.get_tensor(name).numpy() for name in names})
        assert isinstance(outputs, Tensor)
        return outputs
