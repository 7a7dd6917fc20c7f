"""`mixtura fit`: make a model fit a memory budget with the least measured loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mixtura.cli._going_on import told_how_to_go_on

if TYPE_CHECKING:
    from mixtura.fitting import Request

_MMAP_BYTES = 16 << 20

_MEMORY = (
    "Budget of the whole process, such as 24GiB: Python and PyTorch (or llama.cpp), weights, cache, buffers. "
    "Several with commas between make several sizes."
)
_MODEL_MEMORY = (
    "Budget of weights, cache and buffers alone, such as 24MB, or several. Default: half of the weights."
)
_FORMAT = (
    "mixtura: a directory, a width for every expert. gguf: a directory with a file for llama.cpp, a type for "
    "every tensor; needs mixtura[llama]."
)
_TASK = (
    "Your own prompts, JSONL with prompt and answer, messages or text: half of the loss that decides, and of "
    "the calibration text as far as they go."
)
_KEEP = (
    "The domain of the text, such as code, whose loss is to be least, of plans that lose no more in all than "
    "the plain one."
)

_ALLOCATE = (
    "Also try the bits that this allocator gives each expert; may be repeated. `mixtura methods allocators` "
    "lists them."
)


def fit(
    model: str | None = typer.Argument(
        None, help="Directory or hub id (name@revision); without it, the specimen.", show_default=False
    ),
    memory: str | None = typer.Option(None, help=_MEMORY),
    model_memory: str | None = typer.Option(None, help=_MODEL_MEMORY),
    context: int = typer.Option(4096, min=1, help="Tokens of context the cache must hold."),
    text: Path | None = typer.Option(
        None, help="Text to keep the model good at: a file or directory of UTF-8 text or JSONL."
    ),
    max_kl: float | None = typer.Option(None, min=0.0, help="Refuse more loss than this (nats per token)."),
    time: str = typer.Option("30m", help="Observe and search for so long; the best so far is written."),
    estimate: bool = typer.Option(False, "--estimate", help="Say what it would take, and stop."),
    out: Path | None = typer.Option(None, help="New directory for the result. Default: NAME-fit."),
    form: str = typer.Option("mixtura", "--format", help=_FORMAT),
    task: Path | None = typer.Option(None, help=_TASK),
    keep_domain: str | None = typer.Option(None, help=_KEEP),
    allocators: list[str] = typer.Option([], "--allocate", help=_ALLOCATE),
    yes: bool = typer.Option(False, "--yes", help="Download from the hub without asking."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    seed: int = typer.Option(0, min=0, help="Seed of samples and intervals."),
) -> None:
    """Make a model fit a memory budget with the least measured loss, and show the loss.

    Without a budget: half of the model's weights. Several budgets share all that does not depend on them,
    and their results are called NAME-BUDGET. An interrupted fit continues when asked for again, also
    with another budget or another --max-kl.

    Example: `mixtura fit ./OLMoE-1B-7B --memory 8GiB --context 2048 --out OLMoE-8GiB`
    """
    from mixtura.running.memory.process import settle

    # Before PyTorch is first used: a fit streams a large model through little memory.
    settle(_MMAP_BYTES)
    from mixtura.errors import SettingError
    from mixtura.fitting import Request
    from mixtura.report.units import parse_seconds
    from mixtura.running.resolve import resolve_model

    if memory is not None and model_memory is not None:
        raise SettingError("--memory and --model-memory are two ways to say one thing; give only one of them")
    resolved = resolve_model(model, assume_yes=yes)
    request = Request(
        model=resolved.path,
        name=resolved.name,
        out=out or Path(f"{resolved.name.rsplit('/', 1)[-1]}-fit"),
        context=context,
        text=text,
        max_kl=max_kl,
        time_s=parse_seconds(time),
        form=form,
        task=task,
        keep_domain=keep_domain,
        allocators=tuple(allocators),
        seed=seed,
    )
    _one_or_several(request, memory or model_memory or "", memory is not None, estimate, as_json)


def _one_or_several(request: Request, budgets: str, of_process: bool, estimate: bool, as_json: bool) -> None:
    """What is asked for a budget, or for each of several with commas between."""
    from mixtura.errors import SettingError
    from mixtura.fitting import several

    sizes = [size.strip() for size in budgets.split(",")]
    requests = _budgets(request, sizes, of_process=of_process)
    if len(requests) == 1:
        _estimate(requests[0], as_json) if estimate else _fit(requests[0], as_json)
    elif estimate:
        raise SettingError(f"--estimate takes one budget, got {', '.join(sizes)}; ask for each by itself")
    else:
        _fit_several(several(request, sizes, requests), as_json)


def _budgets(request: Request, sizes: list[str], *, of_process: bool) -> list[Request]:
    """The request with each of the budgets; as it is where there is none."""
    from mixtura.report.units import parse_bytes

    if sizes == [""]:
        return [request]
    numbers = [parse_bytes(size) for size in sizes]
    if of_process:
        return [replace(request, memory_bytes=number) for number in numbers]
    return [replace(request, model_memory_bytes=number) for number in numbers]


def _estimate(request: Request, as_json: bool) -> None:
    """Print what a fit would take."""
    from mixtura.fitting import estimate_fit
    from mixtura.fitting.printing import print_estimate

    predicted = estimate_fit(request)
    typer.echo(json.dumps(predicted.to_dict(), indent=1)) if as_json else print_estimate(predicted)


def _fit(request: Request, as_json: bool) -> None:
    """Fit, saying what is being done, and print the result."""
    from mixtura.fitting import fit
    from mixtura.fitting.ongoing import work_directory
    from mixtura.fitting.printing import narrated, print_fitted

    with told_how_to_go_on(work_directory(request)), narrated() as notify:
        fitted = fit(request, notify)
    typer.echo(json.dumps(fitted.to_dict(), indent=1)) if as_json else print_fitted(fitted)


def _fit_several(requests: list[Request], as_json: bool) -> None:
    """Fit to several budgets, and print each result as it comes and all of them at the end."""
    from mixtura.fitting import fit_several
    from mixtura.fitting.ongoing import work_directory
    from mixtura.fitting.printing import narrated, print_fitted, print_sizes

    made = []
    with told_how_to_go_on(work_directory(requests[0])), narrated() as notify:
        for request, fitted in zip(requests, fit_several(requests, notify), strict=True):
            if fitted is None:
                notify(f"{request.out} is there already, from before the interruption")
                continue
            made.append(fitted)
            if not as_json:
                print_fitted(fitted)
    if as_json:
        typer.echo(json.dumps([fitted.to_dict() for fitted in made], indent=1))
    else:
        print_sizes(made)
