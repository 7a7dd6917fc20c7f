"""Compression by explicit choices: a pruner, a merger, a quantizer, calibrated by one reading of a text.

`mixtura fit` searches for the plan of least loss within a budget. Here the user says what is to be done,
and nothing is searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from mixtura.fitting.compressing.records import DEFAULT_LENGTH, DEFAULT_TOKENS, FORMATS, Choices, Compressed
from mixtura.fitting.compressing.run import carry_out

__all__ = ["Choices", "Compressed", "compress"]


def compress(
    model: str | PathLike[str],
    out: str | PathLike[str],
    *,
    prune: str | None = None,
    merge: str | None = None,
    keep: float | None = None,
    neurons: str | None = None,
    keep_neurons: float | None = None,
    quantize: str | None = None,
    bits: float | None = None,
    rest_bits: int | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    servable: bool = False,
    text: str | PathLike[str] | None = None,
    tokens: int = DEFAULT_TOKENS,
    length: int = DEFAULT_LENGTH,
    measure: bool = True,
    seed: int = 0,
    to_format: str = FORMATS[0],
    types: Sequence[str] = (),
    notify: Callable[[str], None] = lambda _: None,
) -> Compressed:
    """Drop, merge and round experts of a checkpoint by methods that you name, and measure what is lost.

    The model is read from disk layer by layer, whatever its size. A call that was stopped goes on when it
    is made again, from the last layer that was finished, and ends with the same bytes.

    Args:
        model: the checkpoint directory; only read.
        out: the new directory, or the new file of a GGUF.
        prune: a pruner, to drop experts.
        merge: a merger, to store groups of experts as one.
        keep: share of the experts of each layer that ``prune`` or ``merge`` is to leave.
        neurons: a trimmer, to take neurons out of every expert; goes alone.
        keep_neurons: share of every expert's neurons that ``neurons`` is to leave.
        quantize: a quantizer, for the experts that are left.
        bits: of a weight, for ``quantize``.
        rest_bits: 8 or 4, for matrices outside the routed experts: attention, embeddings, head and others.
        settings: of the methods, by ``prune``, ``merge``, ``neurons`` and ``quantize``.
        servable: leave only numbers of experts that vLLM's fused routers take.
        text: calibration text and, where it is measured, held-out text: a file or directory; without it,
            text that comes with mixtura.
        tokens: of calibration text.
        length: tokens of a sequence at most.
        measure: measure the loss on held-out text.
        seed: of the choice of text, and of methods that draw lots.
        to_format: ``mixtura``, a directory that is ordinary wherever it can be, ``gguf``, or
            ``compressed-tensors``, of experts that the quantizer ``integers`` rounds.
        types: of a GGUF file's tensors; see `mixtura.export_gguf`.
        notify: told in a few words what is being done.

    Raises:
        UserError: what is asked for cannot be done as asked; the message says what can.
    """
    return carry_out(
        Choices(
            model=Path(model),
            out=Path(out),
            prune=prune,
            merge=merge,
            keep=keep,
            neurons=neurons,
            keep_neurons=keep_neurons,
            quantize=quantize,
            bits=bits,
            rest_bits=rest_bits,
            settings=dict(settings or {}),
            servable=servable,
            text=None if text is None else Path(text),
            tokens=tokens,
            length=length,
            measure=measure,
            seed=seed,
            to_format=to_format,
            types=tuple(types),
        ),
        notify,
    )
