"""The one pass over calibration text that a fit makes: the trace and every expert's prices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.view import LayerView
from mixtura.data.tokens import TokenBatch
from mixtura.fitting.journal import Journal
from mixtura.fitting.pricing import LayerPricer, collect_prices, load_prices, save_prices
from mixtura.fitting.quality import HeldOut
from mixtura.fitting.records import Prices
from mixtura.fitting.texts import Texts
from mixtura.kernels.backend import math_of
from mixtura.running.observing import observe
from mixtura.running.stream import DEFAULT_WORKING_BYTES, Streamed
from mixtura.types.trace import Trace

_STATISTIC = "weighted_output_norm"
_TRACE, _PRICES = "trace.safetensors", "prices.safetensors"


def priced_trace(
    view: CheckpointView, texts: Texts, journal: Journal, notify: Callable[[str], None]
) -> tuple[Trace, Prices]:
    """Observe the original on the calibration text and price every option of every expert.

    Both come from the journal if an earlier run has kept them.
    """
    if not journal.path(_PRICES).is_file():
        notify("observing and pricing every expert")
        trace, prices = _pass(view, texts)

        def save(path: Path) -> None:
            save_prices(prices, path)

        journal.write(_TRACE, trace.save)
        journal.write(_PRICES, save)
    return Trace.load(journal.path(_TRACE)), load_prices(journal.path(_PRICES))


def importance_of(trace: Trace) -> Float[ndarray, " M"]:
    """How much each expert matters: the mean of routing weight times output norm (REAP's score)."""
    return np.concatenate([layer.statistic(_STATISTIC).numpy() for layer in trace.layers])


def _pass(view: CheckpointView, texts: Texts) -> tuple[Trace, Prices]:
    streamed = Streamed(view)
    pricers: list[LayerPricer] = []

    def pricer_for(layer: LayerView) -> LayerPricer:
        pricer = LayerPricer(layer, math_of(streamed.model.get_submodule(layer.name)))
        pricers.append(pricer)
        return pricer

    tokens = _together(texts.calibration)
    length = tokens.input_ids.shape[1]
    trace = observe(
        streamed.model,
        tokens,
        statistics=(_STATISTIC,),
        batch_tokens=max(length, DEFAULT_WORKING_BYTES // streamed.bytes_per_token(length)),
        observers=pricer_for,
        layers=view.layers,
        source_digest=checkpoint_digest(view.path),
    )
    return trace, collect_prices(pricers)


def _together(parts: tuple[HeldOut, ...]) -> TokenBatch:
    """All sequences in one batch, so that the model is read from disk as seldom as can be."""
    width = max(part.input_ids.shape[1] for part in parts)
    names = tuple(dict.fromkeys(name for part in parts for name in part.domain_names))

    def widened(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

    return TokenBatch(
        input_ids=torch.cat([widened(part.input_ids) for part in parts]),
        attention_mask=torch.cat([widened(part.attention_mask) for part in parts]),
        domains=torch.tensor([names.index(part.domain_names[d]) for part in parts for d in part.domains]),
        domain_names=names,
    )
