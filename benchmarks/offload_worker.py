"""One cell of `offload.py`, in a process of its own: some tokens by one engine, timed one by one.

    python offload_worker.py mixtura MODEL '{"ids": [...], ...}'
    python offload_worker.py llama.cpp MODEL.gguf '{"ids": [...], ...}'

Both are given the same tokens, one after the other, whatever they would have said themselves: so both need
the same experts, but for what rounding does. Nothing but the engine that is asked for is imported. Prints one
JSON object; exit code 3 where the model cannot run in so little memory.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNMET = 3


def read_bytes() -> int:
    """Bytes that the process has had read from disk, by reads and by page faults."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def peak_bytes() -> int:
    """The most memory that the process had resident, with mapped files."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def timed(step: Callable[[int], None], ids: list[int], count: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run tokens one by one."""
    times, before = [], read_bytes()
    for token in ids:
        start = time.perf_counter()
        step(token)
        times.append((time.perf_counter() - start) * 1000)
    return {"times_ms": times, "read_bytes": read_bytes() - before, **count()}


def mixtura(path: str, given: dict[str, Any]) -> Callable[[int], None]:
    """A step of mixtura's; `given["count"]` tells what happened to experts since it was last asked."""
    import torch

    from mixtura import load
    from mixtura.errors import BudgetError
    from mixtura.machine.releases import returned_cache, with_cache
    from mixtura.running.tiers.opening import Wish, division_of, tiers_of

    torch.set_num_threads(given["threads"])
    wish = Wish(
        memory=given["memory"], context=given["context"], cache=given["cache"], prefetch=given["prefetch"]
    )
    try:
        model = load(path, memory=wish)
    except BudgetError as refused:
        print(refused, file=sys.stderr)
        raise SystemExit(UNMET) from None
    tiers, division, held = tiers_of(model), division_of(model), {}

    @torch.no_grad()
    def step(token: int) -> None:
        cache = held.get("cache")
        named = {} if cache is None else with_cache(cache)
        outputs = model(input_ids=torch.tensor([[token]]), use_cache=True, **named)
        held["cache"] = returned_cache(outputs)

    def count() -> dict[str, Any]:
        if tiers is None or division is None:
            return {"demanded_bytes": 0, "hit_rate": 1.0}
        seen = tiers.forget_statistics().to_dict()
        del seen["layers"]
        return {**seen, "pool_bytes": division.pool_bytes, "expert_bytes": division.expert_bytes}

    given["count"] = count
    return step


def llama(path: str, given: dict[str, Any]) -> Callable[[int], None]:
    """A step of llama.cpp's, which maps the file."""
    from llama_cpp import Llama

    model = Llama(
        path,
        n_ctx=given["context"],
        n_threads=given["threads"],
        n_threads_batch=given["threads"],
        use_mmap=True,
        verbose=False,
    )
    given["count"] = dict

    def step(token: int) -> None:
        model.eval([token])
        # What it said is computed when it is asked for.
        float(model.scores[model.n_tokens - 1][0])

    return step


def main() -> None:
    """Run the phases that are given."""
    engine, path, text = sys.argv[1:]
    given: dict[str, Any] = json.loads(text)
    start = time.perf_counter()
    step = {"mixtura": mixtura, "llama.cpp": llama}[engine](path, given)
    opened = time.perf_counter() - start
    phases = {name: timed(step, ids, given["count"]) for name, ids in given["phases"].items()}
    print(json.dumps({"open_s": opened, "phases": phases, "peak_bytes": peak_bytes(), "pid": os.getpid()}))


if __name__ == "__main__":
    main()
