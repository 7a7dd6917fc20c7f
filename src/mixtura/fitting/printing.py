"""What a fit prints: the table of models, the domains, and where the result lies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from mixtura.fitting.estimate import Estimate
from mixtura.fitting.frontier import frontier_rows
from mixtura.fitting.report import domain_rows, table_rows
from mixtura.fitting.result import Fitted
from mixtura.report import counted, human_number, human_percent
from mixtura.report.screen import screen, show_table
from mixtura.report.units import format_bytes, format_seconds

_MOST_COLUMNS = 7


@contextmanager
def narrated() -> Iterator[Callable[[str], None]]:
    """Say on standard error what is being done: one line that changes, or one line each for a file."""
    console = screen(stderr=True)
    started = time.monotonic()
    if not console.is_terminal:
        yield lambda text: console.print(f"[{time.monotonic() - started:6.1f} s] {text}")
        return
    with console.status("starting") as status:

        def tell(text: str) -> None:
            # A status reads a string as markup whatever the console does.
            status.update(Text(f"{text}  ({format_seconds(time.monotonic() - started)} so far)"))

        yield tell


def print_table(console: Console, title: str, headers: list[str], cells: list[list[str]]) -> None:
    """A table with its columns turned into rows where it would not fit the terminal."""
    if len(headers) > _MOST_COLUMNS:
        headers, cells = (
            ["", *(row[0] for row in cells)],
            [[header, *(row[i] for row in cells)] for i, header in enumerate(headers) if i],
        )
    show_table(console, headers, cells, title=title)


def print_fitted(fitted: Fitted) -> None:
    """The result of a fit for people, on standard output."""
    console = screen()
    if fitted.out is None:
        before = fitted.before
        console.print(
            f"{fitted.model} fits as it is: it takes {format_bytes(before.accounted_bytes)} "
            f"({format_bytes(before.weights_bytes)} of weights, the rest for "
            f"{counted(fitted.context, 'token')} of context and working buffers) of the "
            f"{format_bytes(fitted.model_budget_bytes)} there are. Nothing was written."
        )
        _print_remarks(console, fitted.remarks)
        return
    print_table(console, "Models", *table_rows(fitted.rows, fitted.runtime_bytes))
    console.print()
    print_table(console, "By domain, on held-out text", *domain_rows(fitted.rows))
    console.print()
    points = frontier_rows(fitted.frontier, fitted.after.quality)
    print_table(console, "The measured frontier", *points)
    console.print()
    _print_remarks(console, fitted.remarks)
    # Lines to copy: a terminal wraps them itself.
    console.print(f"model   {fitted.out}", soft_wrap=True)
    console.print(f"report  {fitted.out}/report.html", soft_wrap=True)
    for where, command in fitted.commands.items():
        console.print(f"run     {command}   ({where})", soft_wrap=True)


def print_sizes(several: Iterable[Fitted]) -> None:
    """The sizes that were made of one model, side by side."""
    rows = [
        [
            str(fitted.out or "unchanged"),
            format_bytes(fitted.budget_bytes),
            format_bytes(fitted.after.weights_bytes),
            human_number(fitted.after.quality.kl),
            human_percent(fitted.after.quality.equal_top),
        ]
        for fitted in several
    ]
    headers = ["model", "budget", "weights", "KL, nats", "same top token"]
    if rows:
        print_table(screen(), "Sizes", headers, rows)


def _print_remarks(console: Console, remarks: Iterable[str]) -> None:
    for remark in remarks:
        console.print(f"note: {remark}", soft_wrap=True)


def print_estimate(estimate: Estimate) -> None:
    """What a fit would take, for people, on standard output."""
    console = screen()
    rows = [
        [
            option.name,
            format_bytes(option.weights_bytes),
            format_bytes(option.accounted_bytes),
            format_bytes(option.accounted_bytes + estimate.runtime_bytes),
            format_bytes(option.active_bytes),
            "–" if option.tokens_per_second is None else human_number(option.tokens_per_second),
            "yes" if option.fits else "no",
        ]
        for option in estimate.options
    ]
    headers = ["plan", "weights", "accounted", "process", "read per token", "tokens/s, about", "fits"]
    show_table(console, headers, rows, title=f"{estimate.model}: what a fit would take")
    console.print(
        f"budget          {format_bytes(estimate.model_budget_bytes)} for weights, cache and buffers"
    )
    limit = format_seconds(estimate.limit_s)
    console.print(f"time needed     about {format_seconds(estimate.seconds)} to try everything")
    console.print(
        f"time limit      {limit} (--time), then about {format_seconds(estimate.finishing_s)} to write"
    )
    console.print(f"bytes read      {format_bytes(estimate.bytes_read)}")
    console.print(f"bytes written   {format_bytes(estimate.bytes_written)}")
    console.print(f"disk needed     {format_bytes(estimate.disk_bytes)}")
    console.print(f"memory to fit   {format_bytes(estimate.fitting_bytes)}")
    _print_remarks(console, estimate.notes)
    if estimate.less is not None:
        _print_remarks(console, [f"within {limit}, {estimate.less.told}"])
