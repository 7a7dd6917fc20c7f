"""What an upcycling prints: what was made, how it does beside the dense models, and how to go on."""

from __future__ import annotations

from mixtura.checkpoints.upcycling.targets import OWN
from mixtura.fitting.quality import ALL
from mixtura.fitting.upcycling.records import Upcycled, listed
from mixtura.report import counted, human_number, human_percent
from mixtura.report.screen import screen, show_table
from mixtura.report.units import format_bytes


def print_upcycled(made: Upcycled) -> None:
    """The result for people, on standard output."""
    console = screen()
    shared = f", one of width {made.shared_width} for every token" if made.shared_width else ""
    experts = (
        f"{counted(made.num_experts, 'expert')} of width {made.d_expert} a layer, {made.top_k} for a "
        f"token{shared}"
    )
    console.print(
        f"{made.family}: {f'new layers {listed(made)}' if made.added_layers else experts}; "
        f"{format_bytes(made.bytes_after)} of weights, {made.sources[0]} has "
        f"{format_bytes(made.bytes_before)}",
        soft_wrap=True,
    )
    if made.after is not None:
        _print_tried(made)
    for note in made.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"model   {made.out}", soft_wrap=True, markup=False)
    for command in commands(made):
        console.print(f"try     {command}", soft_wrap=True, markup=False)


def commands(made: Upcycled) -> tuple[str, ...]:
    """What to do next."""
    if made.added_layers:
        layers = ",".join(map(str, made.added_layers))
        tuned = f"mixtura tune {made.out} --adapter lora --set layers=[{layers}] --data records.jsonl"
        return (f'mixtura generate {made.out} "a prompt"', tuned)
    # Experts of mixtura's own models are of no layout that adapters of experts know.
    adapter = "lora" if made.family == OWN else "expert_lora"
    return (
        f'mixtura generate {made.out} "a prompt"',
        f"mixtura tune {made.out} --adapter {adapter} --data records.jsonl",
    )


def _print_tried(made: Upcycled) -> None:
    assert made.after is not None
    console = screen()
    columns = [*made.before, made.after]
    rows = [
        [domain if domain != ALL else "all", *(human_number(one.perplexity[domain]) for one in columns)]
        for domain in made.after.perplexity
    ]
    console.print()
    show_table(console, ["perplexity", *(one.name for one in columns)], rows)
    console.print()
    if made.beside is not None:
        beside = made.beside
        promised = "promised to be the same" if made.promised else "not promised to be the same"
        console.print(
            f"beside {made.sources[0]} ({promised}): KL {beside.kl:.3g} nats a token, "
            f"{human_percent(beside.same_token)} same likeliest token, logits differ by at most "
            f"{beside.largest:.3g} where they spread by {beside.spread:.3g}",
            soft_wrap=True,
        )
    if made.balance:
        worst = max(made.balance, key=lambda one: one.busiest)
        idle = sum(one.idle for one in made.balance)
        total = made.num_experts * len(made.balance)
        console.print(
            f"balance: the busiest expert gets {worst.busiest:.1f} times an even share (layer "
            f"{worst.layer}); {counted(idle, 'expert')} of {total} got no token",
            soft_wrap=True,
        )
