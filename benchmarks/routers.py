"""Time of every router beside plain top-k, at the widths of OLMoE and Qwen3-30B-A3B.

Each router decides for the same random tokens, in turns with top-k in the same round, so that what else
the machine does falls on both; the ratio is that of medians. Inference is a decision without gradients,
for one token (decoding) and for 512; training is a decision with its losses, and the way back through
both. A router that runs experts to decide has small ones here (width 64), since whole ones would not fit
a machine that measures routers.

    python benchmarks/routers.py --quick
    python benchmarks/routers.py --only top_p expert_choice
    python benchmarks/routers.py --missing

Every router's numbers are kept as soon as they are there, beside those of the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mixtura
from mixtura.machine.processor import processor_name
from mixtura.methods import names
from mixtura.modeling.layer import Experts
from mixtura.modeling.plan import Choice
from mixtura.types import LayerShape, RouterInput

RESULTS = Path(__file__).parent / "results" / "routers.json"
WIDTHS = {"OLMoE": (2048, 64, 8), "Qwen3-30B-A3B": (2048, 128, 8)}
SMALL_EXPERT = 64
LENGTH = 128
PHASES = ("inference", "training")
# A router slower than this is measured fewer times.
ENOUGH_SECONDS, FEWEST_ROUNDS = 10.0, 3
Clock = Callable[[], float]
Key = tuple[str, str, int, str]  # width, phase, number of tokens, router


def make_inputs(shape: LayerShape, num_tokens: int, seed: int) -> RouterInput:
    """Tokens of sequences of 128, with everything that a router may ask for."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(num_tokens)
    length = min(LENGTH, num_tokens)
    scores = torch.randn(num_tokens, length, generator=generator)
    later = torch.arange(length) > (place % length)[:, None]
    labels = ("domain", "language", "modality", "environment", "conditional", "accent")
    return RouterInput.of(
        torch.randn(num_tokens, shape.d_model, generator=generator),
        sequence_ids=place // length,
        positions=place % length,
        token_ids=torch.randint(0, 4096, (num_tokens,), generator=generator),
        labels=dict.fromkeys(labels, place // length % 3),
        attention=scores.masked_fill(later, -torch.inf).softmax(-1),
        experts=Experts(shape).matrices,
    )


def make_router(name: str, shape: LayerShape, top_k: int) -> nn.Module:
    """A router that chooses as many experts as the model's where it can be told to."""
    settings = Choice(name).with_defaults("routers", top_k=top_k, num_layers=2)
    made: nn.Module = mixtura.create("routers", name, shape, **settings)
    return made


def decide(router: nn.Module, inputs: RouterInput) -> None:
    """A decision without gradients."""
    with torch.inference_mode():
        router(inputs)


def train(router: nn.Module, inputs: RouterInput) -> None:
    """A decision with its losses, and the gradients of both."""
    generator = torch.Generator().manual_seed(0)
    x = inputs.x.detach().requires_grad_()
    routing = router(replace(inputs, x=x, training=True, generator=generator))
    parts = [routing.weights, *routing.losses.values(), *([] if routing.extra is None else [routing.extra])]
    total = torch.stack([part.sum() for part in parts]).sum()
    if total.requires_grad:
        torch.autograd.backward(total)


def measure(key: Key, rounds: int, clock: Clock, seed: int) -> dict[str, Any]:
    """Microseconds a token and the ratio to top-k."""
    width, phase, num_tokens, name = key
    d_model, num_experts, top_k = WIDTHS[width]
    shape = LayerShape(d_model, SMALL_EXPERT, num_experts)
    inputs = make_inputs(shape, num_tokens, seed)
    run = train if phase == "training" else decide
    ours, plain = make_router(name, shape, top_k), make_router("top_k", shape, top_k)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for done in range(rounds + 1):
        if sum(times["ours"]) > ENOUGH_SECONDS and done > FEWEST_ROUNDS:
            break
        for kind, router in (("ours", ours), ("plain", plain)):
            router.train(phase == "training")
            start = clock()
            run(router, inputs)
            times[kind].append(clock() - start)
            router.zero_grad(set_to_none=True)
    medians = {kind: statistics.median(found[1:]) for kind, found in times.items()}
    return {
        "router": name,
        "width": width,
        "phase": phase,
        "num_tokens": num_tokens,
        "us_per_token": round(medians["ours"] / num_tokens * 1e6, 4),
        "top_k_us_per_token": round(medians["plain"] / num_tokens * 1e6, 4),
        "over_top_k": round(medians["ours"] / medians["plain"], 3),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, the slowest first."""
    lines = ["| router | width | phase | T | µs a token | over top_k |", "|---|---|---|---|---|---|"]
    for one in sorted(results, key=lambda one: -one.get("over_top_k", 0.0)):
        cells = [one["router"], one["width"], one["phase"], str(one["num_tokens"])]
        cells += (
            [one["error"], ""]
            if "error" in one
            else [f"{one['us_per_token']:.2f}", f"{one['over_top_k']:.2f}"]
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept(path: Path) -> dict[Key, dict[str, Any]]:
    """The numbers that are there already, of routers that still are."""
    found = json.loads(path.read_text())["results"] if path.exists() else []
    there = set(names("routers"))
    return {(r["width"], r["phase"], r["num_tokens"], r["router"]): r for r in found if r["router"] in there}


def keep(args: argparse.Namespace, known: dict[Key, dict[str, Any]]) -> None:
    """Write all numbers, in the order of widths, tokens and names."""
    order = list(WIDTHS)
    record = {
        "benchmark": "routers",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "clock": "CPU time of one thread",
        "rounds": args.rounds,
        "seed": args.seed,
        "hardware": {"cpu": processor_name(), "threads": 1},
        "versions": {"torch": torch.__version__, "mixtura": mixtura.__version__},
        "results": [known[key] for key in sorted(known, key=lambda key: (order.index(key[0]), *key[1:]))],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="OLMoE with 256 tokens, few rounds, nothing written"
    )
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME")
    parser.add_argument("--missing", action="store_true", help="only what has no numbers yet")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help=f"default {RESULTS.name}")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.rounds = [256], 5
    elif args.out is None:
        args.out = RESULTS
    return args


def main() -> None:
    """Measure on one thread by the time it runs, print a table, keep the JSON."""
    args = parse()
    torch.set_num_threads(1)
    known = {} if args.out is None else kept(args.out)
    results = []
    widths = list(WIDTHS)[: 1 if args.quick else None]
    for key in itertools.product(widths, PHASES, args.tokens, args.only or names("routers")):
        width, phase, num_tokens, name = key
        if (args.missing and key in known) or (phase == "training" and num_tokens == 1):
            continue
        try:
            one = measure(key, args.rounds, time.thread_time, args.seed)
        except mixtura.UserError as error:
            one = {"router": name, "width": width, "phase": phase, "num_tokens": num_tokens}
            one["error"] = str(error)
        results.append(one)
        known[key] = one
        if args.out is not None:
            keep(args, known)
        print(table([one]).splitlines()[-1], flush=True)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
