"""The two passes over calibration text: one that observes the original, one that rounds what stays.

Both run layer after layer and keep what each layer put out, so that stopped work goes through the layers
that are done without reading their experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.rounded import RoundedExperts
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.data.tokens import TokenBatch
from mixtura.fitting.clock import Progress
from mixtura.fitting.compressing.rounding import LayerRounder, Shrunk
from mixtura.fitting.journal import Journal
from mixtura.fitting.outputs import KeptOutputs
from mixtura.running.observing.attach import attached
from mixtura.running.observing.importance import OUTPUTS
from mixtura.running.observing.passing import Wanted, recording, trace_of
from mixtura.running.observing.recorder import Cursor
from mixtura.running.stream import Streamed
from mixtura.running.together import Forward, run_together
from mixtura.types.trace import Trace

Notify = Callable[[str], None]

_TRACE = "trace.safetensors"
_ROUNDED = "rounded"


def observed(
    view: CheckpointView, tokens: TokenBatch, wanted: Wanted, journal: Journal, notify: Notify
) -> Trace:
    """Run the original over calibration text once and record what pruners and mergers read.

    All of it comes from the journal if an earlier run has kept it.

    Raises:
        CheckpointError: weights or statistics become NaN or infinite.
    """
    path = journal.path(_TRACE)
    outputs = KeptOutputs(journal, "observed")
    if not path.is_file():
        trace = _observe(view, tokens, wanted, outputs, notify)
        journal.write(_TRACE, trace.save)
    outputs.forget()
    return Trace.load(path)


def _observe(
    view: CheckpointView, tokens: TokenBatch, wanted: Wanted, outputs: KeptOutputs, notify: Notify
) -> Trace:
    streamed, cursor = Streamed(view), Cursor()
    what = "observing the experts on calibration text"
    notify(what)
    progress = Progress(what, len(view.layers), notify)
    with recording(streamed.model, view.layers, cursor, len(tokens.domain_names), wanted) as (
        recorders,
        caught,
    ):

        def run_layer(
            number: int, call: int, forward: Forward, hidden: Tensor, index: Tensor, weights: Tensor
        ) -> Tensor:
            recorder, known = recorders[number], outputs.read(number, call)
            if known is not None:
                made = known.pop(OUTPUTS)
                recorder.start(hidden, index, weights)
                recorder.restore(known)
            else:
                made = forward(hidden, index, weights)
                recorder.check_finite()
                outputs.keep(number, call, {OUTPUTS: made, **recorder.snapshot()})
            progress.advance()
            return made

        watching = {recorder.layer.name: recorder for recorder in recorders}
        with attached(streamed.model, watching, cursor):
            run_together(streamed, tokens, cursor, run_layer, caught=dict(enumerate(caught)))
    return trace_of(streamed.model, tokens, recorders, checkpoint_digest(view.path), wanted)


def rounded(
    view: CheckpointView,
    shrunk: Shrunk,
    tokens: TokenBatch,
    journal: Journal,
    notify: Notify,
) -> RoundedExperts:
    """Round the experts that stay, layer after layer, each on what the compressed layers before give it.

    All of it comes from the journal if an earlier run has kept it.
    """
    kept = RoundedExperts(journal.path("rounded"))
    outputs = KeptOutputs(journal, "rounding")
    if _ROUNDED not in journal.notes():
        _round(view, shrunk, tokens, kept, outputs, notify)
        journal.note(_ROUNDED, {})
    outputs.forget()
    return kept


def _round(
    view: CheckpointView,
    shrunk: Shrunk,
    tokens: TokenBatch,
    kept: RoundedExperts,
    outputs: KeptOutputs,
    notify: Notify,
) -> None:
    rounders: dict[int, LayerRounder] = {}

    def instead(layer: int, expert: int, dtype: Any) -> Any:
        return rounders[layer].decoded(expert, dtype)

    streamed, cursor = Streamed(view, instead, dropped=shrunk.dropped), Cursor()
    for layer in view.layers:
        module = streamed.model.get_submodule(layer.name)
        rounders[layer.index] = LayerRounder(layer, module, shrunk, kept)
    what = "rounding the experts that stay"
    notify(what)
    progress = Progress(what, len(view.layers), notify)

    def run_layer(
        number: int, call: int, forward: Forward, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        known = outputs.read(number, call)
        made = forward(hidden, index, weights) if known is None else known[OUTPUTS]
        if known is None:
            outputs.keep(number, call, {OUTPUTS: made})
        progress.advance()
        return made

    watching = {layer.name: rounders[layer.index] for layer in view.layers}
    with attached(streamed.model, watching, cursor):
        run_together(streamed, tokens, cursor, run_layer)
