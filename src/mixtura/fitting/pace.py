"""How fast this machine works on this model: one expert and one decoder layer, run for a moment.

Every prediction of time is made of these rates, those of ``--estimate`` and the choice of how much text
a fit can read in its time. Each rate is the best of a few repeats, so that what else the machine does
disturbs it least.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from mixtura.checkpoints.packed import MatrixName
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.fitting.palette import STORED, quantizer_of
from mixtura.fitting.quality import score_chunk
from mixtura.fitting.rounding import decoded_matrices
from mixtura.kernels import ExpertTensors
from mixtura.kernels.backend import math_of
from mixtura.kernels.compiled import num_threads
from mixtura.machine.disk import disk_bytes_per_second
from mixtura.methods.quantizers import Encoded
from mixtura.running.memory.available import available_bytes
from mixtura.running.stream import Streamed

_REPEATS = 3
_ROWS = 256
_SEQUENCES, _LENGTH = 2, 256
_HEAD_ROWS, _HEAD_VOCABULARY = 64, 8192


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds on this machine.

    Attributes:
        read_s: for each byte of an expert, read again and again: from memory where the files fit there.
        cold_s: for each byte read for the first time.
        round_s: for each weight that is rounded, by option.
        decode_s: for each weight that is read again after it was rounded, by option.
        row_s: for each weight of an expert and each row it multiplies.
        token_s: for each token, in one decoder layer without its routed experts.
        step_s: for one token alone, in one decoder layer without its routed experts.
        head_s: for each token, for the logits of two models and what is measured of them.
    """

    read_s: float
    cold_s: float
    round_s: Mapping[int, float]
    decode_s: Mapping[int, float]
    row_s: float
    token_s: float
    step_s: float
    head_s: float


def measure_pace(view: CheckpointView, options: Sequence[int] = tuple(STORED)) -> Pace:
    """Measure a model's pace here; reads an expert and a decoder layer, and takes a few seconds.

    ``options`` are the ways of storing experts whose rounding is timed.
    """
    layer = view.layers[0]
    streamed = Streamed(view)
    tensors = layer.native_expert(0)
    num_weights = tensors.up.numel() + tensors.down.numel()
    num_bytes = tensors.up.nbytes + tensors.down.nbytes
    module: Any = streamed.model.get_submodule(layer.name)
    dtype = streamed.model.dtype
    ready = tensors.to(dtype)
    rows = torch.randn(_ROWS, layer.shape.d_model, generator=torch.Generator().manual_seed(0)).to(dtype)
    math = math_of(module)
    transposed = layer.layout.transposed
    with torch.no_grad():
        rounding = {option: _rounding_seconds(tensors, option, transposed=transposed) for option in options}
        warm = best_of(lambda: [t.clone() for t in layer.native_expert(0) if t is not None]) / num_bytes
        multiply = best_of(lambda: math.outputs(math.hidden(rows, ready), ready)) / (num_weights * _ROWS)
    cold = max(warm, 1 / disk_bytes_per_second(Path(view.files[0])))
    return Pace(
        read_s=cold if view.num_bytes > available_bytes() else warm,
        cold_s=cold,
        round_s={option: both[0] / num_weights for option, both in rounding.items()},
        decode_s={option: both[1] / num_weights for option, both in rounding.items()},
        row_s=multiply,
        token_s=_token_seconds(streamed, _SEQUENCES, _LENGTH),
        step_s=_token_seconds(streamed, 1, 1),
        head_s=_head_seconds(streamed),
    )


def best_of(work: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


class _SeenEnoughError(Exception):
    """The layer that is timed is done; the rest of the model need not run."""


def _token_seconds(streamed: Streamed, num_sequences: int, length: int) -> float:
    """Seconds a token takes in the first decoder layer with experts, these left out."""
    layer = streamed.view.layers[0]
    block = streamed.model.get_submodule(layer.site.block_name)
    experts: Any = streamed.model.get_submodule(layer.name)
    times: list[float] = []

    def begin(*_: Any) -> None:
        times.append(time.perf_counter())

    def end(*_: Any) -> None:
        times.append(time.perf_counter())
        raise _SeenEnoughError

    # The reading of the layer's weights, a hook as well, comes before.
    handles = [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    experts.forward = lambda hidden, *_, **__: torch.zeros_like(hidden)
    vocabulary = int(streamed.model.config.get_text_config().vocab_size)
    positions = getattr(streamed.model.config.get_text_config(), "max_position_embeddings", None) or length
    ids = torch.arange(num_sequences * min(length, positions)).view(num_sequences, -1) % vocabulary
    spans = []
    try:
        for _ in range(_REPEATS):
            times.clear()
            try:
                streamed.hidden(ids, torch.ones_like(ids))
            except _SeenEnoughError:
                spans.append(times[-1] - times[0])
    finally:
        del experts.forward
        for handle in handles:
            handle.remove()
    return min(spans) / ids.numel()


def _head_seconds(streamed: Streamed) -> float:
    """Seconds for the logits of one token by two models and their comparison, by part of the vocabulary."""
    config: Any = streamed.model.config.get_text_config()
    vocabulary = int(config.vocab_size)
    part = min(vocabulary, _HEAD_VOCABULARY)
    width = streamed.view.layers[0].shape.d_model
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(part, width, generator=generator).to(streamed.model.dtype)
    states = torch.randn(_HEAD_ROWS, width, generator=generator).to(streamed.model.dtype)
    targets = torch.zeros(_HEAD_ROWS, dtype=torch.int64)

    def compare() -> Tensor:
        one, other = states @ weight.T, states @ weight.T
        score_chunk(one, other, targets)
        return one

    return best_of(compare) / _HEAD_ROWS * vocabulary / part


def _rounding_seconds(tensors: ExpertTensors, option: int, *, transposed: bool) -> tuple[float, float]:
    """Seconds for rounding an expert by the moments of some inputs, and for decoding it again."""
    quantizer = quantizer_of(option)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    encodings: dict[MatrixName, Encoded] = {}
    for name, matrix in (("up", tensors.up), ("down", tensors.down)):
        oriented = (matrix.mT if transposed else matrix).contiguous()
        inputs = torch.randn(_ROWS, oriented.shape[1], generator=generator)
        encodings[name] = quantizer.encode(oriented, inputs.T @ inputs)  # type: ignore[index]
    rounded = time.perf_counter()
    decoded_matrices(encodings, option, tensors.up.dtype, transposed=transposed)
    # Experts are rounded side by side.
    return (rounded - start) / num_threads(), time.perf_counter() - rounded
