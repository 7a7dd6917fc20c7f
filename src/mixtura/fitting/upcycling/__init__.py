"""Making an MoE model of dense ones, and trying at once what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from mixtura.fitting.upcycling.records import DEFAULT_LENGTH, DEFAULT_TOKENS, Request, Upcycled
from mixtura.fitting.upcycling.run import carry_out

__all__ = ["Request", "Upcycled", "compose", "upcycle"]

Place = str | PathLike[str]


def upcycle(
    model: Place,
    out: Place,
    *,
    method: str = "copies",
    experts: int | None = None,
    top_k: int = 2,
    target: str | None = None,
    settings: Mapping[str, Any] | None = None,
    text: Place | None = None,
    tokens: int = DEFAULT_TOKENS,
    length: int = DEFAULT_LENGTH,
    measure: bool = True,
    seed: int = 0,
    notify: Callable[[str], None] = lambda _: None,
) -> Upcycled:
    """Make an MoE model of a dense one, as an ordinary checkpoint that plain transformers loads.

    Weights go from disk to disk, an expert at a time. A call that was stopped goes on when it is made
    again, and ends with the same bytes.

    Args:
        model: the dense model's directory, or an MoE model's for methods that change one; only read.
        out: the new directory.
        method: an upcycler that takes one model; `mixtura.names("upcyclers")` lists all.
        experts: how many each layer is to have; by default 8.
        top_k: how many a token is routed to.
        target: the MoE family of the result; by default the first that can hold it.
        settings: of the method.
        text: calibration text, where the method reads any, and text it is tried on: a file or directory;
            without it, text that comes with mixtura.
        tokens: of calibration text.
        length: tokens of a sequence at most.
        measure: try the result beside the dense model: perplexity by domain, loss, balance.
        seed: of what is drawn, and of the choice of text.
        notify: told in a few words what is being done.

    Raises:
        UserError: it cannot be done as asked; the message says what can.
    """
    request = Request(
        sources=(Path(model),),
        out=Path(out),
        method=method,
        experts=experts,
        top_k=top_k,
        target=target,
        settings=dict(settings or {}),
        text=None if text is None else Path(text),
        tokens=tokens,
        length=length,
        measure=measure,
        seed=seed,
    )
    return carry_out(request, notify)


def compose(
    models: Sequence[Place],
    out: Place,
    *,
    method: str = "prompt_gates",
    experts: int | None = None,
    top_k: int = 2,
    target: str | None = None,
    settings: Mapping[str, Any] | None = None,
    prompts: Place | None = None,
    text: Place | None = None,
    length: int = DEFAULT_LENGTH,
    measure: bool = True,
    seed: int = 0,
    notify: Callable[[str], None] = lambda _: None,
) -> Upcycled:
    """Make one MoE model of several dense models that were made from the same one.

    Args:
        models: their directories; the first gives what is not an expert, unless the method averages that.
        out: the new directory.
        method: an upcycler that takes several models.
        experts: how many each layer is to have; by default one for each model.
        top_k: how many a token is routed to.
        target: the MoE family of the result; by default the first that can hold it.
        settings: of the method.
        prompts: a JSON file of prompts for each model; see `mixtura.fitting.upcycling.prompts`.
        text: what the result is tried on: a file or directory; without it, text that comes with mixtura.
        length: tokens of a sequence at most.
        measure: try the result beside each of the models.
        seed: of what is drawn, and of the choice of text.
        notify: told in a few words what is being done.

    Raises:
        UserError: it cannot be done as asked; the message says what can.
    """
    request = Request(
        sources=tuple(Path(one) for one in models),
        out=Path(out),
        method=method,
        composes=True,
        experts=experts,
        top_k=top_k,
        target=target,
        settings=dict(settings or {}),
        prompts=None if prompts is None else Path(prompts),
        text=None if text is None else Path(text),
        length=length,
        measure=measure,
        seed=seed,
    )
    return carry_out(request, notify)
