"""Decoding a model that is larger than its memory: ours beside llama.cpp's mmap, under one limit.

A checkpoint of Qwen3-30B-A3B's shape with fewer layers and random weights (4 layers are 5 GB in bfloat16) is
made once. Random weights route every token anywhere: the worst case for any cache. Each run is a process of
its own in a memory control group of version 1, whose limit counts the page cache, too, at 75, 50 and 25 % of
the weights; what the files left in the page cache is given up before each run (cold). Runs are interleaved.

    python benchmarks/offload.py make offload-model
    python benchmarks/offload.py run offload-model --repeats 5 --llama llama-bench --gguf model.gguf

``--llama`` is the llama-bench of a build of llama.cpp (its source is in the source distribution of
llama-cpp-python on PyPI), ``--gguf`` the same weights as a GGUF file in bfloat16 (llama.cpp's own converter
writes one). Without them only ours is measured. Control groups need root.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from made import make

SHARES = (0.75, 0.5, 0.25)
NUM_TOKENS = 32
# What a process takes beside the model, so that the limit is what the share of the weights leaves.
RUNTIME_BYTES = 600 << 20
GROUP = Path("/sys/fs/cgroup/memory/mixtura-offload")
UNMET = 3
PROMPT = "0 1 2 3 4 5 6 7 8 9"


class Refused(Exception):  # noqa: N818
    """The model cannot run in so little."""


@contextmanager
def limited(limit_bytes: int) -> Iterator[Path]:
    """A control group whose limit counts the page cache."""
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(limit_bytes))
    (GROUP / "memory.max_usage_in_bytes").write_text("0")
    try:
        yield GROUP
    finally:
        GROUP.rmdir()


def run_in(group: Path, command: list[str]) -> str:
    """A command's output."""
    script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, str(group), *command], capture_output=True, text=True, check=False
    )
    if done.returncode == UNMET:
        raise Refused(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def forget(folder: Path) -> None:
    """Let the system give up what it holds of files."""
    for file in folder.iterdir() if folder.is_dir() else [folder]:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def ours(model: Path, limit: int, cache: str, prefetch: str) -> dict[str, Any]:
    """Tokens in a second and what was read, by `mixtura generate`."""
    command = [sys.executable, "-m", "mixtura", "generate", str(model), PROMPT, "--json"]
    command += ["--max-new-tokens", str(NUM_TOKENS), "--memory", str(limit)]
    command += ["--cache", cache, "--prefetch", prefetch]
    with limited(limit) as group:
        found = json.loads(run_in(group, command))
    seen = found["experts"]
    return {
        "tokens_per_second": found["tokens_per_second"],
        "hit_rate": seen["hit_rate"],
        "demanded_bytes": seen["demanded_bytes"],
        "waited_ms": seen["waited_ms"],
        "peak_bytes": found["peak_bytes"],
    }


def theirs(bench: Path, gguf: Path, limit: int, threads: int) -> dict[str, Any]:
    """Tokens in a second by llama-bench, which maps the file."""
    command = [str(bench), "-m", str(gguf), "-p", "0", "-n", str(NUM_TOKENS), "-r", "1", "-t", str(threads)]
    with limited(limit) as group:
        found = json.loads(run_in(group, [*command, "-o", "json"]))
        peak = int((group / "memory.max_usage_in_bytes").read_text())
    return {"tokens_per_second": found[-1]["avg_ts"], "peak_bytes": peak}


def weights_bytes(model: Path) -> int:
    """Bytes of all weight files."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def run(given: argparse.Namespace) -> None:
    """Every share, interleaved; medians at the end."""
    rows: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for _ in range(given.repeats):
        for share in SHARES:
            limit = int(share * weights_bytes(given.model)) + RUNTIME_BYTES
            forget(given.model)
            try:
                made = ours(given.model, limit, given.cache, given.prefetch)
                rows.setdefault((share, "mixtura"), []).append(made)
            except Refused as reason:
                print(f"{share:.0%} mixtura: {reason}", flush=True)
            if given.llama is not None and given.gguf is not None:
                forget(given.gguf)
                made = theirs(given.llama, given.gguf, limit, given.threads)
                rows.setdefault((share, "llama.cpp"), []).append(made)
    for (share, name), made in rows.items():
        speeds = sorted(one["tokens_per_second"] for one in made)
        line = f"{share:.0%} {name}: {statistics.median(speeds):.2f} tokens/s"
        line += f" ({speeds[0]:.2f} to {speeds[-1]:.2f})"
        if name == "mixtura":
            line += f", hit rate {statistics.median(one['hit_rate'] for one in made):.1%}"
        print(line, flush=True)
    if given.out is not None:
        named = [{"share": share, "name": name, "runs": made} for (share, name), made in rows.items()]
        given.out.write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Make the checkpoint, or run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("model", type=Path)
    making.add_argument("--layers", type=int, default=4)
    running = commands.add_parser("run")
    running.add_argument("model", type=Path)
    running.add_argument("--repeats", type=int, default=5)
    running.add_argument("--cache", default="lru")
    running.add_argument("--prefetch", default="none")
    running.add_argument("--llama", type=Path)
    running.add_argument("--gguf", type=Path)
    running.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    running.add_argument("--out", type=Path)
    given = parser.parse_args()
    make(given.model, given.layers) if given.command == "make" else run(given)


if __name__ == "__main__":
    main()
