"""Time nested codes beside codes of one width, and measure what nesting costs in error.

Experts of OLMoE's width run for a few tokens from random codes: int8, int4 and int2 from copies of their
own, and one nested copy read at 8, 4 and 2 bits. All take turns, round after round, and the rate at which
this machine reads memory is measured in the same rounds. Errors are relative to the norm of the
weights: of a normal matrix, and of the experts of the model that comes with mixtura.

    python benchmarks/nested.py       # about a minute
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode import GROUP, random_matrix
from layer import machine, spread
from torch import Tensor

import mixtura
from mixtura.kernels import ExpertMath, ExpertMatrices, Matrix, NativeLayer, nested_matrix, using
from mixtura.kernels.activations import Activation
from mixtura.kernels.few import run_few
from mixtura.kernels.rates import MemoryReader
from mixtura.methods.quantizers import Encoded
from mixtura.methods.quantizers.nested import Nested
from mixtura.methods.quantizers.round_to_nearest import RoundToNearest

RESULTS = Path(__file__).parent / "results" / "nested.json"
D_MODEL, D_EXPERT, NUM_EXPERTS, TOP_K = 2048, 1024, 64, 8
WIDTHS = (8, 4, 2)
MATH = ExpertMath(Activation("silu"), known=Activation("silu"))


class Store:
    """Experts of one layer for the kernels, and the bytes that one token reads of them."""

    def __init__(self, experts: list[ExpertMatrices]) -> None:
        self.num_experts = len(experts)
        self.token_bytes = TOP_K * (experts[0].up.num_bytes + experts[0].down.num_bytes)
        layer = NativeLayer.of(experts)
        assert layer is not None
        self._layer = layer

    def native_layer(self) -> NativeLayer:
        """The experts as the kernels read them."""
        return self._layer


def nested_copies(rows: int, cols: int, generator: torch.Generator) -> dict[int, Matrix]:
    """One nested matrix of random codes as it is read at each width."""
    shape = (rows, cols // 4)
    codes = {
        name: torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        for name, size in (("codes_2", shape), ("codes_4", shape), ("codes_8", (2, *shape)))
    }
    found = {}
    for bits, (*names, _) in Nested().widths.items():
        scales = torch.full((rows, cols // GROUP), 3.5 * cols**-0.5 / 2**bits, dtype=torch.bfloat16)
        planes = [codes[name] for name in names]
        matrix = nested_matrix(planes, scales, cols=cols, bits=bits, group=GROUP)
        assert matrix is not None
        found[bits] = matrix
    return found


def stores() -> dict[str, Store]:
    """Every way to store the experts."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2 * D_EXPERT, D_MODEL), (D_MODEL, D_EXPERT))
    found = {}
    for bits in WIDTHS:
        made = [[random_matrix(*size, bits, generator) for size in sizes] for _ in range(NUM_EXPERTS)]
        found[f"int{bits}"] = Store([ExpertMatrices(*matrices) for matrices in made])
    nested = [[nested_copies(*size, generator) for size in sizes] for _ in range(NUM_EXPERTS)]
    for bits in WIDTHS:
        found[f"nested {bits}"] = Store([ExpertMatrices(up[bits], down[bits]) for up, down in nested])
    return found


def run_layer(store: Store, x: Tensor, ids: Tensor, weights: Tensor, int8: bool) -> float:
    """Seconds of one call."""
    with using("exact", int8_inputs=int8):
        start = time.perf_counter()
        run_few(x, ids, weights, store, MATH)
        return time.perf_counter() - start


def measure_times(rounds: int, calls: int) -> list[dict[str, Any]]:
    """Each way to store, with inputs of bfloat16 and of eight bits, for one token and for four."""
    made = stores()
    generator = torch.Generator().manual_seed(1)
    memory = MemoryReader()
    cases: dict[tuple[str, int, bool], list[float]] = {
        (name, tokens, int8): [] for name in made for tokens in (1, 4) for int8 in (False, True)
    }
    rates = []
    for _ in range(rounds):
        rates.append(memory.bytes_per_second() / 1e9)
        for (name, tokens, int8), times in cases.items():
            x = torch.randn(tokens, D_MODEL, generator=generator).bfloat16()
            weights = torch.rand(tokens, TOP_K, generator=generator)
            call: Callable[[Tensor], float] = partial(run_layer, made[name], x, weights=weights, int8=int8)
            draws = [torch.rand(tokens, NUM_EXPERTS, generator=generator) for _ in range(calls)]
            # Other experts in every call, as in a model, so that their codes come from memory.
            times.append(sorted(call(ids=draw.topk(TOP_K).indices) for draw in draws)[calls // 2])
    return [
        {"what": "read rate", "gb_per_s": spread(rates)},
        *(
            {
                "store": name,
                "tokens": tokens,
                "inputs": "int8" if int8 else "bfloat16",
                "ms": spread([1e3 * t for t in times]),
                # Several tokens share experts: how many bytes they read depends on the draw.
                "gb_per_s": spread([made[name].token_bytes / t / 1e9 for t in times])
                if tokens == 1
                else None,
            }
            for (name, tokens, int8), times in cases.items()
        ),
    ]


def error(weights: list[Tensor], store: Callable[[Tensor], Tensor]) -> float:
    """Norm of the error over the norm of the weights, over all matrices."""
    lost = sum(float((store(w) - w).square().sum()) for w in weights)
    return (lost / sum(float(w.square().sum()) for w in weights)) ** 0.5


def cut(bits: int) -> Callable[[Tensor], Tensor]:
    """A matrix as its nested copy is read at so many bits."""

    def store(weight: Tensor) -> Tensor:
        encoded = Nested(group_size=GROUP).encode(weight)
        kept = {name: encoded.tensors[name] for name in Nested().widths[bits]}
        return Nested(group_size=GROUP).decode(Encoded(kept, encoded.meta))

    return store


def rounded(bits: int) -> Callable[[Tensor], Tensor]:
    """A matrix as `round_to_nearest` stores it in so many bits."""
    quantizer = RoundToNearest(bits=bits, group_size=GROUP)
    return lambda weight: quantizer.decode(quantizer.encode(weight))


def measure_errors() -> list[dict[str, Any]]:
    """Nested and plain codes on normal weights and on a trained model's."""
    from mixtura.running.resolve import resolve_model

    layers = mixtura.open_model(resolve_model(None).path).layers
    trained = [getattr(layer.expert(0), name).float() for layer in layers for name in ("gate", "up", "down")]
    normal = [torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))]
    return [
        {
            "weights": name,
            "bits": bits,
            "nested": round(error(weights, cut(bits)), 5),
            "round_to_nearest": round(error(weights, rounded(bits)), 5),
        }
        for name, weights in (("normal", normal), ("specimen", trained))
        for bits in WIDTHS
    ]


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--calls", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {"mixtura": mixtura.__version__, "torch": torch.__version__},
        "errors": measure_errors(),
        "times": measure_times(args.rounds, args.calls),
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for row in (*results["errors"], *results["times"]):
        print(row)


if __name__ == "__main__":
    main()
