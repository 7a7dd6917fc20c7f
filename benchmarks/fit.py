"""Time `mixtura fit` on a checkpoint of a real shape, and what its result loses beside the plain plan.

    python benchmarks/fit.py DIRECTORY         # 4 layers of Qwen3-30B-A3B into 3 GiB in 30 minutes
    python benchmarks/fit.py DIRECTORY --memory 3GiB --time 12m

The checkpoint is made in DIRECTORY if it is not there (`made.py`). The row says what was predicted, what each
stage took, the peak of memory, and what follows for the whole model: all but the first seconds grow with the
number of layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from layer import machine
from made import LAYERS, make

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.summary import summarize
from mixtura.report.units import parse_seconds

RESULTS = Path(__file__).parent / "results" / "fit.json"
WHOLE_LAYERS = 48


def command(*arguments: str) -> list[str]:
    """A command of mixtura that prints JSON."""
    return [sys.executable, "-m", "mixtura", *arguments, "--json"]


def fitted(*arguments: str) -> tuple[dict[str, Any], int]:
    """What a fit prints, and the peak of its memory up to the moment when it writes its result.

    After that it runs the original and the result for a moment, where there is memory for them.
    """
    peak = 0
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            command("fit", *arguments), stdout=printed, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            if not peak and "writing the model" in line:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
                peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        if process.wait() != 0:
            raise SystemExit("the fit failed; see above")
        printed.seek(0)
        found: dict[str, Any] = json.loads(printed.read())
    return found, peak


def measured(model: Path, memory: str, limit: str) -> dict[str, Any]:
    """One fit, with what was predicted of it."""
    asked = (str(model), "--memory", memory, "--time", limit)
    predicted = json.loads(subprocess.check_output(command("fit", *asked, "--estimate"), text=True))
    with tempfile.TemporaryDirectory(dir=model.parent) as place:
        started = time.monotonic()
        found, peak = fitted(*asked, "--out", f"{place}/out")
        seconds = time.monotonic() - started
    summary = summarize(open_checkpoint(model))
    rows = {row["name"]: row for row in found["rows"]}
    return {
        "model": f"Qwen3-30B-A3B, {summary.num_layers} of {WHOLE_LAYERS} layers",
        "parameters": summary.num_parameters,
        "memory": memory,
        "time": limit,
        "predicted_s": min(predicted["seconds"], parse_seconds(limit)) + predicted["finishing_s"],
        "seconds": round(seconds, 1),
        "stages": found["about"]["time"],
        "seconds_per_billion_parameters": round(seconds / (summary.num_parameters / 1e9), 1),
        "peak_bytes": peak,
        "before_bytes": rows["before"]["weights_bytes"],
        **{name: told(rows[name]) for name in ("uniform", "chosen")},
        "tried": [(one["label"], one["accounted_bytes"], one["kl"]) for one in found["tried"]],
        "left_out": found["left_out"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "load": os.getloadavg()[2],
        **machine(),
    }


def told(row: dict[str, Any]) -> dict[str, Any]:
    """What a row of the fit's table says."""
    kept = ("label", "weights_bytes", "accounted_bytes", "peak_bytes", "tokens_per_second")
    return {key: row[key] for key in kept} | {"kl": row["quality"]["kl"]}


def main() -> None:
    """Run one fit and add it to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--time", default="30m")
    given = parser.parse_args()
    row = measured(make(given.directory, given.layers), given.memory, given.time)
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    same = ("model", "memory", "time")
    rows = [old for old in rows if any(old[key] != row[key] for key in same)] + [row]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
