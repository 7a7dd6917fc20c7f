"""Time the experts backend against transformers' own, beside what the machine can do at all.

One experts module of each of three well-known models' widths runs by every implementation in turn,
round after round in one process, so that whatever else the machine does falls on all alike; ratios
are taken within a round. Two limits are measured in the same rounds: a dense matrix product of a
shape that suits the machine (rate of arithmetic), and a pass over a large array (rate of reading).

    python benchmarks/layer.py            # everything, about 25 minutes on 2 quiet cores
    python benchmarks/layer.py --quick    # one model, three batch sizes, about a minute

Rows measured anew take the place of those kept, so the table may be filled piece by piece.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import mixtura
from mixtura.kernels.matmul import linear
from mixtura.kernels.rates import MemoryReader

RESULTS = Path(__file__).parent / "results" / "layer.json"
OURS = "mixtura"
THEIRS = ("eager", "batched_mm", "grouped_mm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_TOKENS = (1, 4, 16, 64, 512, 2048)
MIN_ROUNDS, MAX_ROUNDS = 3, 40
Clock: TypeAlias = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Width:
    """The experts of one model. Its router hands on weights in float32, or in the tokens' dtype."""

    name: str
    experts: type[nn.Module]
    config: PreTrainedConfig
    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    float32_weights: bool

    @property
    def expert_elements(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.d_model * self.d_expert


WIDTHS = (
    Width(
        "OLMoE",
        OlmoeExperts,
        OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64),
        2048,
        1024,
        64,
        8,
        False,
    ),
    Width(
        "Qwen3-30B-A3B",
        Qwen3MoeExperts,
        Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128),
        2048,
        768,
        128,
        8,
        False,
    ),
    Width(
        "Mixtral",
        MixtralExperts,
        MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=8),
        4096,
        14336,
        8,
        2,
        True,
    ),
)


def make_experts(width: Width, dtype: torch.dtype, seed: int) -> nn.Module:
    """The experts module with random weights; experts differ by a factor, which is quick to make."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        module = width.experts(width.config).to(dtype)
    module.to_empty(device="cpu").requires_grad_(False)
    for parameter in module.parameters():
        one = torch.randn(parameter.shape[1:], generator=generator) * parameter.shape[-1] ** -0.5
        for expert in range(parameter.shape[0]):
            parameter[expert] = one * (1 + expert / width.num_experts)
    return module


def make_batch(width: Width, num_tokens: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and choices of a router that is uniform on the whole but never in a batch."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width.d_model, generator=generator).to(dtype)
    scores = torch.randn(num_tokens, width.num_experts, generator=generator).softmax(-1)
    weights, ids = scores.topk(width.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    return hidden, ids, weights if width.float32_weights else weights.to(dtype)


class Limits:
    """What the machine does at best: arithmetic per second in a dtype, bytes read per second."""

    def __init__(self, dtype: torch.dtype, seed: int, clock: Clock) -> None:
        self._clock = clock
        generator = torch.Generator().manual_seed(seed)
        self._weight = torch.randn(2048, 2048, generator=generator).to(dtype)
        tokens = torch.randn(2048, 2048, generator=generator).to(dtype)
        # The faster of the two kernels and of two heights is "a shape that suits the machine".
        products: list[tuple[Callable[..., Tensor], Tensor]] = [
            (product, tokens[:rows]) for product in (F.linear, linear) for rows in (512, 2048)
        ]
        self._product, self._tokens = max(products, key=lambda one: max(self._rate(*one) for _ in range(4)))
        self._memory = MemoryReader()

    def _rate(self, product: Callable[..., Tensor], tokens: Tensor) -> float:
        seconds = seconds_of(lambda: product(tokens, self._weight), self._clock)
        return 2 * tokens.shape[0] * self._weight.numel() / seconds

    def flops_per_second(self) -> float:
        """The rate of one dense matrix product, now."""
        return self._rate(self._product, self._tokens)

    def bytes_per_second(self) -> float:
        """The rate of one pass over memory far larger than any cache, now."""
        return self._memory.bytes_per_second(self._clock)


def seconds_of(call: Callable[[], object], clock: Clock) -> float:
    """Time of one call."""
    start = clock()
    call()
    return clock() - start


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the results."""

    width: Width
    dtype: str
    num_tokens: int
    seed: int
    gradients: bool
    clock: Clock
    budget_s: float
    max_copied_bytes: int

    def measure(self, module: nn.Module, limits: Limits) -> dict[str, Any]:
        """Time every implementation that is not too large, round by round."""
        batch = make_batch(self.width, self.num_tokens, DTYPES[self.dtype], self.seed)
        skipped = self._skipped(batch[0].element_size())
        names = [name for name in (*THEIRS, OURS) if name not in skipped]
        differences = self._differences(module, batch, names)
        rounds: list[dict[str, float]] = []
        flops, reads = [], []
        deadline = time.perf_counter() + self.budget_s
        while len(rounds) < MIN_ROUNDS or (time.perf_counter() < deadline and len(rounds) < MAX_ROUNDS):
            turn = len(rounds) % len(names)
            order = names[turn:] + names[:turn]
            rounds.append({name: self._seconds(module, batch, name) for name in order})
            flops.append(limits.flops_per_second())
            reads.append(limits.bytes_per_second())
        touched = len(set(batch[1].flatten().tolist()))
        return {
            "model": self.width.name,
            "dtype": self.dtype,
            "num_tokens": self.num_tokens,
            "pass": "forward and backward" if self.gradients else "forward",
            "num_rounds": len(rounds),
            "load_average": round(os.getloadavg()[0], 2),
            "ms": {name: spread([1e3 * one[name] for one in rounds]) for name in names},
            "skipped": skipped,
            "largest_difference_to_eager": differences,
            "touched_experts": touched,
            **self._ratios(
                rounds, flops, reads, touched * self.width.expert_elements * batch[0].element_size()
            ),
        }

    def _skipped(self, element_size: int) -> dict[str, str]:
        copied = self.num_tokens * self.width.top_k * self.width.expert_elements * element_size
        if copied <= self.max_copied_bytes:
            return {}
        return {"batched_mm": f"would copy {copied / 2**30:.0f} GiB of weights, its own for every assignment"}

    def _run(self, module: nn.Module, batch: Sequence[Tensor], name: str) -> Tensor:
        config: Any = module.config
        config._experts_implementation = name
        outputs: Tensor = module(*batch)
        return outputs

    def _seconds(self, module: nn.Module, batch: Sequence[Tensor], name: str) -> float:
        if self.gradients:
            hidden = batch[0].clone().requires_grad_()

            def both() -> None:
                torch.autograd.backward(self._run(module, (hidden, *batch[1:]), name).sum())
                module.zero_grad(set_to_none=True)

            return seconds_of(both, self.clock)
        with torch.inference_mode():
            return seconds_of(lambda: self._run(module, batch, name), self.clock)

    def _differences(
        self, module: nn.Module, batch: Sequence[Tensor], names: Sequence[str]
    ) -> dict[str, float]:
        """Relative to the norm; this also warms every implementation up."""
        with torch.inference_mode():
            expected = self._run(module, batch, "eager").float()
            found = {name: self._run(module, batch, name).float() for name in names}
        for name in names:
            self._seconds(module, batch, name)
        return {name: float((value - expected).norm() / expected.norm()) for name, value in found.items()}

    def _ratios(
        self, rounds: list[dict[str, float]], flops: list[float], reads: list[float], num_bytes: int
    ) -> dict[str, Any]:
        ours = [one[OURS] for one in rounds]
        rivals = [name for name in THEIRS if name in rounds[0]]
        best = min(rivals, key=lambda name: statistics.median(one[name] for one in rounds))
        work = 2 * self.num_tokens * self.width.top_k * self.width.expert_elements
        work *= 3 if self.gradients else 1
        dense = [work / rate for rate in flops]
        reading = [num_bytes / rate for rate in reads]
        return {
            "best_of_theirs": best,
            "time_over_best_of_theirs": spread([a[OURS] / a[best] for a in rounds]),
            "dense_ms": spread([1e3 * one for one in dense]),
            "dense_gflops": spread([rate / 1e9 for rate in flops]),
            "share_of_dense_rate": spread([a / b for a, b in zip(dense, ours, strict=True)]),
            "reading_ms": spread([1e3 * one for one in reading]),
            "read_gb_per_s": spread([rate / 1e9 for rate in reads]),
            "share_of_read_rate": spread([a / b for a, b in zip(reading, ours, strict=True)]),
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 5), "p25": round(low, 5), "p75": round(high, 5)}


def machine() -> dict[str, Any]:
    """The hardware the times hold for."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def cell(result: dict[str, Any], name: str) -> str:
    """Median milliseconds, or a dash where the implementation was left out."""
    found = result["ms"].get(name)
    return f"{found['median']:.3g}" if found else "–"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: milliseconds, ours over the best of theirs, shares of the two limits."""
    columns = ["model", "dtype", "T", *THEIRS, OURS, "over best (quartiles)", "of dense rate", "of read rate"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for one in results:
        ratio = one["time_over_best_of_theirs"]
        cells = [one["model"], one["dtype"], str(one["num_tokens"])]
        cells += [cell(one, name) for name in (*THEIRS, OURS)]
        cells.append(f"{ratio['median']:.2f} ({ratio['p25']:.2f} to {ratio['p75']:.2f})")
        cells += [f"{one[name]['median']:.0%}" for name in ("share_of_dense_rate", "share_of_read_rate")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [width.name for width in WIDTHS]
    parser.add_argument("--quick", action="store_true", help="OLMoE at T = 1, 16 and 512, few rounds")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(NUM_TOKENS))
    parser.add_argument("--gradients", action="store_true", help="time forward and backward together")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row, at least three rounds")
    parser.add_argument("--max-copied-gib", type=float, default=4.0, help="more, and batched_mm is left out")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, timed by what it runs and not by what it waits: for a machine that is not quiet",
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help=f"default {RESULTS.name}; --quick writes none")
    args = parser.parse_args()
    if args.quick:
        args.models, args.tokens, args.seconds = ["OLMoE"], [1, 16, 512], 3.0
    elif args.out is None:
        args.out = RESULTS
    return args


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row that was asked for, one printed as soon as it is there."""
    results: list[dict[str, Any]] = []
    clock = time.thread_time if args.cpu_time else time.perf_counter
    for width in (width for width in WIDTHS if width.name in args.models):
        for dtype in args.dtypes:
            module = make_experts(width, DTYPES[dtype], args.seed).requires_grad_(args.gradients)
            limits = Limits(DTYPES[dtype], args.seed, clock)
            for num_tokens in args.tokens:
                copied = int(args.max_copied_gib * 2**30)
                case = Case(width, dtype, num_tokens, args.seed, args.gradients, clock, args.seconds, copied)
                results.append(case.measure(module, limits))
                print(table(results[-1:]).splitlines()[-1], flush=True)
            del module, limits
            gc.collect()
    return results


def joined(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows together with those that the file holds of other cases, in the order of the table."""

    def case(one: dict[str, Any]) -> tuple[Any, ...]:
        return one["model"], one["dtype"], one["num_tokens"], one["pass"]

    known = json.loads(path.read_text())["results"] if path.exists() else []
    new = {case(one) for one in rows}
    names, dtypes = [width.name for width in WIDTHS], list(DTYPES)
    return sorted(
        [one for one in known if case(one) not in new] + rows,
        key=lambda one: (
            names.index(one["model"]),
            dtypes.index(one["dtype"]),
            one["num_tokens"],
            one["pass"],
        ),
    )


def main() -> None:
    """Measure, print a table, keep the JSON."""
    args = parse()
    if args.threads is not None or args.cpu_time:
        torch.set_num_threads(1 if args.cpu_time else args.threads)
    mixtura.register_backend()
    start = time.perf_counter()
    results = measure_all(args)
    if args.out is not None:
        results = joined(args.out, results)
    record = {
        "benchmark": "layer",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "clock": "CPU time of one thread" if args.cpu_time else "wall time",
        "seed": args.seed,
        "hardware": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mixtura": mixtura.__version__,
        },
        "results": results,
    }
    print("\n" + table(results))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
