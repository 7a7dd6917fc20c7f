"""A GGUF file run by llama.cpp itself, in a process of its own: what it takes, says and loses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

from mixtura.errors import UserError
from mixtura.kernels.compiled import num_threads


@final
@dataclass(frozen=True, slots=True)
class LlamaRun:
    """What llama.cpp made of a file.

    Attributes:
        peak_bytes: the most resident memory of its process, what it read of the file included.
        tokens_per_second: of one sequence after a short prompt; None where it was not asked for.
        answers: what it wrote after each prompt, greedily.
        losses: negative log-likelihood of each sequence's tokens after the first, added up, in nats.
    """

    peak_bytes: int
    tokens_per_second: float | None = None
    answers: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()


def run_llama(
    path: Path,
    context: int,
    *,
    num_new_tokens: int = 0,
    prompts: Sequence[tuple[str, int]] = (),
    sequences: Sequence[Sequence[int]] = (),
) -> LlamaRun:
    """Run a file in llama.cpp.

    Args:
        path: the file.
        context: tokens its cache holds.
        num_new_tokens: generate so many tokens at the end of a full context, and time them.
        prompts: texts to go on with, and by how many tokens at most.
        sequences: tokens to be predicted.

    Raises:
        UserError: llama.cpp is not installed, or does not run the file; says what it said.
    """
    request = {
        "path": str(path),
        "context": context,
        "threads": num_threads(),
        "num_new_tokens": num_new_tokens,
        "prompts": [list(prompt) for prompt in prompts],
        "sequences": [list(ids) for ids in sequences],
    }
    found = _asked(request)
    return LlamaRun(
        found["peak_bytes"],
        found.get("tokens_per_second"),
        tuple(found["answers"]),
        tuple(found["losses"]),
    )


@cache
def runtime_bytes() -> int:
    """What llama.cpp takes from Python without any model: measured once per process."""
    return int(_asked({"path": None})["peak_bytes"])


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "mixtura.running.llama_process"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["it was ended, most likely for want of memory"]
        raise UserError(f"running {request['path'] or 'llama.cpp'} in llama.cpp failed: {said[0]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
