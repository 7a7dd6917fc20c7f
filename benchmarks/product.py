"""Time and memory of layers of 10^3 to 10^5 experts: grids of halves, atomic ones, and plain ones.

Each layer is routed and computed for the same random tokens, forward and backward, on one thread, timed by
the processor's time for it, so that other work on the machine counts little. ``product`` has Monet's router
and experts, ``atomic`` OmniMoE's, ``plain`` a router with a row for each expert and experts of the width that
``product`` has, computed expert by expert by the kernels of every other MoE layer here. Memory is what passes
add to the process's peak, gradients included; each layer runs in a process of its own.

    python benchmarks/product.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import mixtura
from mixtura.machine.processor import processor_name
from mixtura.modeling.experts import Experts
from mixtura.modeling.layer import MoELayer
from mixtura.types import LayerShape, RouterInput

RESULTS = Path(__file__).parent / "results" / "product.json"
NUM_EXPERTS = (1024, 10_000, 102_400)
D_MODEL, D_EXPERT, TOP_K = 128, 8, 16


def product(num_experts: int) -> MoELayer:
    """Monet's router and experts."""
    shape = LayerShape(D_MODEL, D_EXPERT, num_experts)
    router = mixtura.create("routers", "monet", shape, num_heads=4)
    return MoELayer(router, Experts(mixtura.create("experts", "product", shape)))


def atomic(num_experts: int) -> MoELayer:
    """OmniMoE's router and experts, as many hidden features a token as the plain layer has."""
    shape = LayerShape(D_MODEL, 1, num_experts)
    router = mixtura.create("routers", "product_key", shape, top_k=TOP_K * D_EXPERT)
    return MoELayer(router, Experts(mixtura.create("experts", "atomic", shape)))


def plain(num_experts: int) -> MoELayer:
    """A row of the router and matrices for each expert."""
    shape = LayerShape(D_MODEL, D_EXPERT, num_experts)
    settings = {"activation": "relu_squared", "gated": False}
    bank = mixtura.create("experts", "ffn", shape, **settings)
    return MoELayer(mixtura.create("routers", "top_k", shape, top_k=TOP_K), Experts(bank))


LAYERS: dict[str, Callable[[int], MoELayer]] = {"product": product, "atomic": atomic, "plain": plain}


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, num_experts: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """One layer's numbers."""
    torch.set_num_threads(1)
    layer = LAYERS[name](num_experts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, D_MODEL, generator=generator)

    def both_ways() -> None:
        layer.zero_grad(set_to_none=True)
        layer(RouterInput.of(x, training=True))[0].sum().backward()

    def forward() -> None:
        with torch.inference_mode():
            layer(RouterInput.of(x))

    before = peak_bytes()
    times: dict[str, float] = {}
    for key, run in (("forward", forward), ("both_ways", both_ways)):
        found = []
        for _ in range(rounds + 1):
            start = time.process_time()
            run()
            found.append(time.process_time() - start)
        times[f"{key}_us_per_token"] = round(statistics.median(found[1:]) / num_tokens * 1e6, 2)
    return {
        "layer": name,
        "num_experts": num_experts,
        "num_parameters": sum(one.numel() for one in layer.parameters()),
        "added_mib": round((peak_bytes() - before) / (1 << 20), 1),
        **times,
    }


def main() -> None:
    """Measure every layer, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    apart = multiprocessing.get_context("fork")
    rows = []
    for num_experts in NUM_EXPERTS:
        for name in LAYERS:
            with apart.Pool(1) as pool:
                rows.append(pool.apply(measure, (name, num_experts, given.tokens, given.rounds)))
            print(json.dumps(rows[-1]), flush=True)
    values = {
        "benchmark": "product",
        "date": datetime.now(UTC).date().isoformat(),
        "seed": 0,
        "hardware": processor_name(),
        "versions": {"torch": torch.__version__, "mixtura": mixtura.__version__},
        "num_tokens": given.tokens,
        "d_model": D_MODEL,
        "d_expert": D_EXPERT,
        "top_k": TOP_K,
        "results": rows,
    }
    given.out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
