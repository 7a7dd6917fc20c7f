"""Decoding a model that is larger than its memory: ours beside llama.cpp's mmap, under one limit.

A checkpoint of Qwen3-30B-A3B's shape with 4 of its 48 layers, random weights and as much less of a vocabulary
(5.1 GB in bfloat16) is made once, and the same weights as a GGUF file. Each run is a process of its own in a
memory control group of version 1, whose limit counts the page cache, too: 25, 50 and 75 % of the weights, and
600 MiB for what a process takes beside them. Both engines are given the same tokens, so that both need the
same experts: tokens right after the start, in which ours finds out how it can run (first); tokens drawn
evenly, with little of the files in memory (cold), then more of them (warm), which spread over all experts,
the worst case for any cache; then the words of a text.

    python benchmarks/offload.py                           # everything, about 12 minutes on 2 quiet cores
    python benchmarks/offload.py --llama-python PYTHON     # of an environment that has llama-cpp-python
    python benchmarks/offload.py --quick                   # 1 layer, once: does it run?

Engines take turns. Every cell is written down as soon as it is measured (in DIRECTORY/journal.jsonl), so a
run that was stopped goes on where it was; give --anew to forget them. Just before each pair of runs the
disk's rate is measured on the same files, past the page cache. The disk's limit of a row is that rate over
the bytes that a token had to wait for; where the engine is slower than that with everything in memory (110
%), that is its limit. Without llama-cpp-python only ours is measured. Control groups need root.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from layer import machine
from made import make
from offload_worker import UNMET

import mixtura
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.text import held_out
from mixtura.running.memory.runtime import known_runtime_bytes

RESULTS = Path(__file__).parent / "results" / "offload.json"
WORKER = Path(__file__).parent / "offload_worker.py"
OURS, THEIRS = "mixtura", "llama.cpp"
# The first holds everything: what memory and arithmetic allow.
WHOLE = 1.1
SHARES = (WHOLE, 0.75, 0.5, 0.25)
LAYERS, VOCABULARY = 4, 16384
# What a process takes beside the model, so that the limit is what the share of the weights leaves.
RUNTIME_BYTES = 600 << 20
CONTEXT = 256
NUM_TOKENS = {"first": 2, "cold": 12, "warm": 24, "text": 24}
# Reading to learn the disk's rate: chunks, reads on their way together, seconds.
CHUNK_BYTES, DEPTH, PROBE_S = 1 << 20, 4, 2.0
GROUP = Path("/sys/fs/cgroup/memory/mixtura-offload")
LONGEST_S = 300


def say(line: str) -> None:
    """Progress, with the time."""
    print(f"{datetime.now(tz=UTC):%H:%M:%S} {line}", flush=True)


@contextmanager
def limited(limit_bytes: int) -> Iterator[Path]:
    """A control group whose limit counts the page cache."""
    if not (GROUP.parent / "memory.limit_in_bytes").exists():
        raise SystemExit("this needs memory control groups of version 1, at /sys/fs/cgroup/memory, and root")
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(limit_bytes))
    (GROUP / "memory.max_usage_in_bytes").write_text("0")
    try:
        yield GROUP
    finally:
        for _ in range(50):
            try:
                GROUP.rmdir()
                break
            except OSError:  # The last of its processes is still on its way out.
                time.sleep(0.1)


def run_in(group: Path, command: Sequence[str]) -> dict[str, Any] | None:
    """What a worker prints; None where the model cannot run in so little."""
    script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, str(group), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_S,
    )
    if done.returncode == UNMET:
        say(done.stderr.strip().splitlines()[-1])
        return None
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed ({done.returncode}): {done.stderr.strip()[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["group_peak_bytes"] = int((group / "memory.max_usage_in_bytes").read_text())
    return found


def files_of(place: Path) -> list[Path]:
    """A file, or the weights of a folder."""
    return [place] if place.is_file() else sorted(place.glob("*.safetensors"))


def forget(place: Path) -> None:
    """Let the system give up what it holds of files."""
    for file in files_of(place):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_rate(place: Path, seconds: float) -> float:
    """Bytes in a second by random direct reads, several on their way together."""
    files = [(os.open(file, os.O_RDONLY | os.O_DIRECT), file.stat().st_size) for file in files_of(place)]
    done, until = [0] * DEPTH, time.perf_counter() + seconds

    def read(number: int) -> None:
        buffer, drawn = mmap.mmap(-1, CHUNK_BYTES), random.Random(f"{number} {time.time_ns()}")
        while time.perf_counter() < until:
            file, size = drawn.choice(files)
            at = drawn.randrange(max(1, (size - CHUNK_BYTES) // 4096)) * 4096
            done[number] += os.preadv(file, [buffer], at)

    start = time.perf_counter()
    threads = [threading.Thread(target=read, args=(number,)) for number in range(DEPTH)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    for file, _ in files:
        os.close(file)
    return sum(done) / took


def phases(model: Path, scale: float) -> dict[str, list[int]]:
    """The tokens of each phase, the same for both engines."""
    drawn = random.Random(0)
    text = " ".join(document.text for document in held_out(4000, 0))
    words = load_tokenizer(model)(text[:800])["input_ids"]
    counts = {name: max(2, int(num * scale)) for name, num in NUM_TOKENS.items()}
    names = ("first", "cold", "warm")
    even = {name: [drawn.randrange(VOCABULARY) for _ in range(counts[name])] for name in names}
    return {**even, "text": [int(one) for one in words[: counts["text"]]]}


def measure(engine: str, place: Path, limit: int, given: argparse.Namespace) -> dict[str, Any] | None:
    """One run of one engine, cold."""
    python = sys.executable if engine == OURS else given.llama_python
    settings = {
        "memory": limit,
        "context": CONTEXT,
        "threads": given.threads,
        "cache": given.cache,
        "prefetch": given.prefetch,
        "phases": phases(given.directory / "model", 0.2 if given.quick else 1.0),
    }
    forget(place)
    with limited(limit) as group:
        return run_in(group, [python, str(WORKER), engine, str(place), json.dumps(settings)])


def run(given: argparse.Namespace) -> None:
    """Every share and engine, in turns."""
    places = prepared(given)
    weights = sum(file.stat().st_size for file in files_of(places[OURS]))
    journal = given.directory / "journal.jsonl"
    if given.anew:
        journal.unlink(missing_ok=True)
    lines = journal.read_text().splitlines() if journal.exists() else []
    # A line that was being written when the machine stopped is measured again.
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    known = {tuple(row["key"]) for row in rows}
    told = [given.cache, given.prefetch, given.threads, given.layers, bool(given.quick)]
    for number in range(given.repeats):
        for share in SHARES:
            limit = int(share * weights) + RUNTIME_BYTES
            rate = 0.0
            for engine in [*places][:: 1 if number % 2 else -1]:
                key = (engine, share, number, *(told if engine == OURS else told[2:]))
                if key in known:
                    continue
                rate = rate or disk_rate(places[OURS], 0.5 if given.quick else PROBE_S)
                row = {"key": key, "share": share, "engine": engine, "limit_bytes": limit, "disk_rate": rate}
                row["found"] = measure(engine, places[engine], limit, given)
                rows.append(row)
                with journal.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                say(progress(row, number))
    mine = [row for row in rows if [*row["key"]][3:] in (told, told[2:])]
    table = summary(mine)
    print(as_markdown(table))
    if not given.quick:
        write(table, given, weights)


def progress(row: dict[str, Any], number: int) -> str:
    """One cell in a line."""
    head = f"round {number + 1}, {row['share']:.0%}, {row['engine']}: "
    if row["found"] is None:
        return head + "cannot run in so little"
    parts = [
        f"{name} {1000 * len(p['times_ms']) / sum(p['times_ms']):.2f}"
        for name, p in row["found"]["phases"].items()
    ]
    return f"{head}{', '.join(parts)} tokens/s; disk {row['disk_rate'] / 1e9:.2f} GB/s"


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each share, phase and engine: medians of runs, p99 of all their tokens."""
    table = []
    for share in SHARES:
        for phase in NUM_TOKENS:
            for engine in (OURS, THEIRS):
                mine = [r for r in rows if r["share"] == share and r["engine"] == engine and r["found"]]
                if mine:
                    table.append(line_of(share, phase, engine, mine))
    return with_limits(table)


def with_limits(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each line's limit: what the disk allows, or the engine's speed with all in memory if that is less."""
    whole = {(r["phase"], r["engine"]): r["tokens_per_second"] for r in table if r["share"] == WHOLE}
    for one in table:
        known = [one["disk_limit"], whole.get((one["phase"], one["engine"]))]
        known = [limit for limit in known if limit is not None]
        one["limit"] = min(known) if known and one["share"] != WHOLE else None
    return table


def line_of(share: float, phase: str, engine: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one engine's runs at one share."""
    runs = [row["found"]["phases"][phase] for row in rows]
    times = sorted(t for one in runs for t in one["times_ms"])
    speeds = [1000 * len(one["times_ms"]) / sum(one["times_ms"]) for one in runs]
    missed = [one.get("demanded_bytes", one["read_bytes"]) / len(one["times_ms"]) for one in runs]
    limits = [row["disk_rate"] / one for row, one in zip(rows, missed, strict=True) if one]
    return {
        "share": share,
        "phase": phase,
        "engine": engine,
        "runs": len(rows),
        "tokens_per_second": statistics.median(speeds),
        "slowest_run": min(speeds),
        "fastest_run": max(speeds),
        "p50_ms": statistics.median(times),
        "p99_ms": times[min(len(times) - 1, int(0.99 * len(times)))],
        "missed_bytes_per_token": statistics.median(missed),
        "read_bytes_per_token": statistics.median(one["read_bytes"] / len(one["times_ms"]) for one in runs),
        "disk_limit": statistics.median(limits) if limits else None,
        "hit_rate": statistics.median(one["hit_rate"] for one in runs) if "hit_rate" in runs[0] else None,
        "limit_bytes": rows[0]["limit_bytes"],
        "peak_bytes": max(row["found"]["peak_bytes"] for row in rows),
        "group_peak_bytes": max(row["found"]["group_peak_bytes"] for row in rows),
    }


def as_markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "| memory | tokens | engine | tokens/s | p50 ms | p99 ms | missed MB/token | disk | of limit | hits "
        "| peak GB of limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in table:
        limit = one["limit"]
        of_limit = f"{one['tokens_per_second'] / limit:.0%} of {limit:.1f}" if limit else ""
        disk = f"{one['disk_limit']:.1f}" if one["disk_limit"] else ""
        hits = "" if one["hit_rate"] is None else f"{one['hit_rate']:.0%}"
        lines.append(
            f"| {one['share']:.0%} | {one['phase']} | {one['engine']} | {one['tokens_per_second']:.2f} "
            f"({one['slowest_run']:.2f} to {one['fastest_run']:.2f}) | {one['p50_ms']:.0f} "
            f"| {one['p99_ms']:.0f} | {one['missed_bytes_per_token'] / 1e6:.0f} | {disk} | {of_limit} "
            f"| {hits} "
            f"| {one['peak_bytes'] / 1e9:.2f} of {one['limit_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def write(table: Sequence[dict[str, Any]], given: argparse.Namespace, weights: int) -> None:
    """The results, with what they hold for."""
    facts = {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "machine": machine(),
        "versions": {
            "mixtura": mixtura.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": f"{given.layers} layers of Qwen3-30B-A3B's shape, bfloat16, random weights, seed 0",
        "weights_bytes": weights,
        "cache": given.cache,
        "prefetch": given.prefetch,
        "threads": given.threads,
        "rows": list(table),
    }
    given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    say(f"written to {given.out}")


def prepared(given: argparse.Namespace) -> dict[str, Path]:
    """The checkpoint and, for llama.cpp, the same weights as a GGUF file."""
    given.directory.mkdir(parents=True, exist_ok=True)
    # Measured once for a machine and kept; in a cell it would take the room of what is measured.
    torch.set_num_threads(given.threads)
    known_runtime_bytes()
    model, gguf = given.directory / "model", given.directory / "model.gguf"
    say(f"making {model}, unless it is there")
    make(model, given.layers, vocabulary=VOCABULARY)
    if not given.llama_python:
        say("no environment with llama-cpp-python was named (--llama-python): only ours is measured")
        return {OURS: model}
    if not gguf.exists():
        say(f"writing {gguf}")
        mixtura.export_gguf(model, gguf)
    return {OURS: model, THEIRS: gguf}


def main() -> None:
    """Make what is needed, then run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", default=Path("build/offload"))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", default="auto")
    parser.add_argument("--prefetch", default="none")
    parser.add_argument("--llama-python", help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--anew", action="store_true", help="forget what was measured")
    parser.add_argument("--quick", action="store_true", help="1 layer, once, few tokens; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.quick:
        given.layers, given.repeats = 1, 1
        given.directory = given.directory.with_name(given.directory.name + "-quick")
    if given.llama_python is None:
        found = subprocess.run([sys.executable, "-c", "import llama_cpp"], capture_output=True, check=False)
        given.llama_python = sys.executable if found.returncode == 0 else ""
    run(given)


if __name__ == "__main__":
    main()
