"""What a compression prints: sizes and loss, experts dropped, merged, rounded, and how to run the result."""

from __future__ import annotations

from collections.abc import Iterator

from mixtura.fitting.compressing.records import Compressed
from mixtura.fitting.quality import ALL
from mixtura.fitting.records import Quality
from mixtura.report import counted, human_number, human_percent
from mixtura.report.screen import screen, show_table
from mixtura.report.units import format_bytes

_MOST_LINES = 12


def print_compressed(made: Compressed) -> None:
    """The result for people, on standard output."""
    console = screen()
    rows = [
        _row("before", made.bytes_before, made.quality_before),
        _row("after", made.bytes_after, made.quality),
    ]
    show_table(console, ["", "weights", "KL", "perplexity", "same token"], rows, title=made.model)
    console.print()
    lines = list(_by_layer(made))
    for line in lines[:_MOST_LINES]:
        console.print(line, soft_wrap=True)
    if len(lines) > _MOST_LINES:
        console.print(f"and {len(lines) - _MOST_LINES} more lines; compressed.json and --json have all of it")
    for line in _seldom(made):
        console.print(f"note: {line}", soft_wrap=True)
    for note in made.notes:
        console.print(f"note: {note}", soft_wrap=True)
    # Lines to copy: a terminal wraps them itself.
    console.print(f"model   {made.out}", soft_wrap=True)
    for command in made.commands:
        console.print(f"try     {command}", soft_wrap=True, markup=False)


def _row(name: str, num_bytes: int, quality: Quality | None) -> list[str]:
    if quality is None:
        return [name, format_bytes(num_bytes), "-", "-", "-"]
    kl = f"{quality.kl:.4g} ({quality.kl_low:.3g} to {quality.kl_high:.3g})"
    shown = [kl, human_number(quality.perplexity[ALL]), human_percent(quality.equal_top)]
    return [name, format_bytes(num_bytes), *shown]


def _by_layer(made: Compressed) -> Iterator[str]:
    if made.width is not None:
        yield f"{made.width[1]} of {made.width[0]} neurons stay in every expert"
    rounding = {one.layer: one for one in made.rounding}
    for layer in sorted({*made.dropped, *made.merged, *rounding}):
        parts = []
        if layer in made.dropped:
            gone = made.dropped[layer]
            parts.append(f"{len(gone)} dropped ({', '.join(map(str, gone))})")
        if layer in made.merged:
            groups = " ".join("+".join(map(str, group)) for group in made.merged[layer])
            parts.append(f"merged {groups}")
        if layer in rounding:
            one = rounding[layer]
            parts.append(f"{one.num_experts} rounded, their outputs off by {one.error:.3%} in squares")
        yield f"layer {layer}: {'; '.join(parts)}"


def _seldom(made: Compressed) -> Iterator[str]:
    """Experts that calibration text says little of, by name."""
    named = [f"{layer}.{e} ({n})" for layer, few in made.seldom.items() for e, n in few.items()]
    if named:
        shown = ", ".join(named[:_MOST_LINES]) + (" and others" if len(named) > _MOST_LINES else "")
        yield (
            f"{counted(len(named), 'expert')} that stay were reached by fewer than {made.few} of "
            f"{made.num_tokens} calibration tokens, as layer.expert (tokens): {shown}; give more --tokens or "
            f"--text that is more like what the model is for"
        )
