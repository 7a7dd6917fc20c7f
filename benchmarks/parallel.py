"""Experts on several processes: bytes and step time by method, beside transformers own and plain copies.

    torchrun --nproc-per-node 2 benchmarks/parallel.py [--nodes 2] [--steps 10] [--out results/parallel.json]

A Qwen3-MoE model of random weights, the same tokens in all arms, a forward and a backward pass and the
reduction of gradients, no optimizer; arms take turns, the median of all rounds is kept. Links and rates are
measured first, on other sizes than the model's, and the time of exchanges and experts is predicted from them;
what a step takes without experts is measured, not predicted. Results are those of the first process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from layer import machine
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import mixtura
from mixtura.kernels import routed_experts
from mixtura.methods._activations import swiglu
from mixtura.running.parallel.pricing import exchanged
from mixtura.running.parallel.traffic import traffic_of
from mixtura.types.placement import Cluster, Link

D, F, E, K, LAYERS = 256, 512, 16, 4, 4
ROWS, LENGTH = 4, 128
ARMS = (
    ("contiguous", "flat"),
    ("random", "flat"),
    ("hecate", "flat"),
    ("least_loaded", "flat"),
    ("adaptive", "flat"),
    ("contiguous", "lsh"),
    ("contiguous", "hierarchical"),
    ("contiguous", "two_dimensional"),
)


def make() -> Qwen3MoeForCausalLM:
    """The model, the same in all processes."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=D, intermediate_size=F, moe_intermediate_size=F, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=E, num_experts_per_tok=K,
        norm_topk_prob=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    mixtura.register_backend()
    model.set_experts_implementation("mixtura")
    return model.train()


def batch(rank: int) -> Tensor:
    return torch.randint(2, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(rank))


def step_of(model: Any, ids: Tensor, after: Callable[[], None]) -> float:
    """Seconds of a step."""
    dist.barrier()
    before = time.perf_counter()
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    after()
    dist.barrier()
    return time.perf_counter() - before


def native(folder: str, size: int) -> tuple[Any, Callable[[], None]]:
    """transformers' own expert parallelism."""
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        make().save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(fsdp_size=size, ep_size=size, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
    return model.train(), lambda: None


def copies() -> tuple[Any, Callable[[], None]]:
    """All experts on every process."""
    return DistributedDataParallel(make(), find_unused_parameters=True), lambda: None


def measured_cluster(nodes: int) -> Cluster:
    """Links and rates of these processes, by exchanges of two sizes and one multiplication of experts."""
    size = dist.get_world_size()

    def way(numbers: int) -> float:
        sent, came = torch.ones(size * numbers, 64), torch.empty(size * numbers, 64)
        times = []
        for _ in range(15):
            dist.barrier()
            before = time.perf_counter()
            dist.all_to_all_single(came, sent)
            times.append(time.perf_counter() - before)
        return statistics.median(times)

    few, many = way(16), way(4096)
    moved = (size - 1) * (4096 - 16) * 64 * 4
    link = Link(
        latency_s=max(few / max(size - 1, 1), 1e-7), bytes_per_s=max(moved / max(many - few, 1e-6), 1.0)
    )
    up, down = torch.randn(8, 2 * 384, 192, requires_grad=True), torch.randn(8, 192, 384, requires_grad=True)
    x = torch.randn(2048, 192, requires_grad=True)
    rows, ones = torch.arange(2048), torch.ones(2048)
    times = []
    for _ in range(5):
        dist.barrier()
        before = time.perf_counter()
        routed_experts(x, rows, rows % 8, ones, up, down, activation=swiglu).sum().backward()
        times.append(time.perf_counter() - before)
    rate = 3 * 2048 * 6 * 192 * 384 / statistics.median(times)
    shared = torch.tensor([rate, link.bytes_per_s, link.latency_s], dtype=torch.float64)
    dist.all_reduce(shared)
    rate, speed, latency = (shared / size).tolist()
    link = Link(latency_s=latency, bytes_per_s=speed)
    return Cluster(
        num_nodes=nodes, devices_per_node=size // nodes, flops_per_s=rate, memory_num_bytes=1 << 40,
        within=link, between=link,
    )  # fmt: skip


def predicted_s(parallel: Any, cluster: Cluster, counts: list[Tensor]) -> float:
    """Seconds that experts and exchanges are predicted to take in a step without copies."""
    total = 0.0
    for layer, loads in zip(parallel.placement.layers, counts, strict=True):
        way = traffic_of(layer, loads, cluster)
        total += 4 * exchanged(way, cluster, D * 4, ("all",))[0]
        total += float(way.computed.max()) * 3 * 6 * D * F / cluster.flops_per_s
    return total


def counts_of() -> list[Tensor]:
    """Assignments by process and expert of each layer."""
    model, found = make(), []

    def count(_: Any, given: tuple[Tensor, ...]) -> None:
        found.append(torch.bincount(given[1].flatten(), minlength=E))

    hooks = [m.register_forward_pre_hook(count) for n, m in model.named_modules() if n.endswith(".experts")]
    with torch.no_grad():
        model(input_ids=batch(dist.get_rank()), use_cache=False)
    for hook in hooks:
        hook.remove()
    size = dist.get_world_size()
    every = []
    for one in found:
        rows = [torch.empty_like(one) for _ in range(size)]
        dist.all_gather(rows, one)
        every.append(torch.stack(rows).double())
    return every


def without_experts_s(ids: Tensor, steps: int) -> float:
    """Seconds of a step of what is outside the experts, gradients reduced as the arms do."""
    model = make()
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.forward = lambda hidden, *_: hidden
    own = [p for n, p in model.named_parameters() if ".experts." not in n]

    def reduce() -> None:
        for parameter in own:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)

    return statistics.median([step_of(model, ids, reduce) for _ in range(steps)])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    ids, cluster, counts = batch(rank), measured_cluster(arguments.nodes), counts_of()
    mesh = None
    if arguments.nodes > 1:
        mesh = init_device_mesh(
            "cpu", (arguments.nodes, size // arguments.nodes), mesh_dim_names=("node", "device")
        )
    made: dict[str, tuple[Any, Callable[[], None], Any]] = {"every expert everywhere": (*copies(), None)}
    failed = {}
    for placement, exchange in ARMS:
        if exchange in ("hierarchical", "two_dimensional") and arguments.nodes == 1:
            continue
        settings = {"least_loaded": {"least_rows": 16}, "adaptive": {"row_num_bytes": D * 4}}.get(
            placement, {}
        )
        parallel = mixtura.parallelize(make(), mesh, placement, exchange=exchange, settings=settings)
        made[f"{placement}, {exchange}"] = (parallel.model, parallel.reduce_gradients, parallel)
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        try:
            made["transformers' expert parallelism"] = (*native(shared[0], size), None)
        except Exception as error:
            failed["transformers' expert parallelism"] = f"{type(error).__name__}: {error}"[:300]
        dist.barrier()
    times: dict[str, list[float]] = {name: [] for name in made}
    sent: dict[str, dict[str, int]] = {}
    for number in range(arguments.steps + 1):
        for name, (model, after, parallel) in made.items():
            if parallel is not None:
                parallel.wire.sent.clear()
            took = step_of(model, ids, after)
            if parallel is not None:
                sent[name] = dict(parallel.wire.sent)
                parallel.end_step()
            if number:
                times[name].append(took)
    outside = without_experts_s(ids, arguments.steps)
    rows = []
    for name, (_, _, parallel) in made.items():
        row = {"arm": name, "step_s": statistics.median(times[name]), "least_s": min(times[name])}
        if parallel is not None:
            row["sent"] = sent[name]
            if name in ("contiguous, flat", "random, flat"):
                row["predicted_s"] = outside + predicted_s(parallel, cluster, counts)
        rows.append(row)
    return {
        "rows": rows,
        "failed": failed,
        "outside_s": outside,
        "flops_per_s": cluster.flops_per_s,
        "latency_s": cluster.within.latency_s,
        "bytes_per_s": cluster.within.bytes_per_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "parallel.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    busy = os.getloadavg()[0]
    found = run(arguments)
    found |= {
        "processes": dist.get_world_size(),
        "nodes": arguments.nodes,
        "sizes": {"D": D, "F": F, "E": E, "K": K, "layers": LAYERS, "tokens": ROWS * LENGTH},
        "seed": 0,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": machine(),
        "load_before": round(busy, 1),
        "busy": "yes" if busy > 1 else "no",
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
    if dist.get_rank() == 0:
        before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        before[f"{found['processes']} processes, {found['nodes']} nodes"] = found
        arguments.out.write_text(json.dumps(before, indent=1) + "\n")
        for row in found["rows"]:
            told = f"{row.get('sent', '')} {row.get('predicted_s', '')}"
            print(f"{row['arm']:36s} {1000 * row['step_s']:8.1f} ms  {told}")
        print(found["failed"] or "", f"outside {1000 * found['outside_s']:.1f} ms", f"load {busy}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
