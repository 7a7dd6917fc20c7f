"""A process that loads a model, generates a little and reports the memory it took: run as a module."""

from __future__ import annotations

import json
import sys
from pathlib import Path

_SHORT_PROMPT = 64


def main(directory: str, context: int, num_new_tokens: int) -> None:
    """Read a prompt of ``context - num_new_tokens`` tokens, generate the rest, print the measurement."""
    from mixtura.running.memory.process import peak_resident_bytes, resident_bytes, settle

    settle()
    from mixtura.checkpoints.tokenizer import load_tokenizer

    path = Path(directory)
    # Reading a tokenizer takes twice what it keeps; it comes first, when nothing else is there.
    tokenizer = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
    from mixtura.running.generation import Clock, new_tokens, spread_ids, tokens_per_second
    from mixtura.running.loading import load

    model = load(path)
    loaded = resident_bytes()
    clock = Clock()
    prompt_ids = spread_ids(model, max(context - num_new_tokens, 1))
    made = new_tokens(
        model,
        prompt_ids,
        max_new_tokens=num_new_tokens,
        min_new_tokens=num_new_tokens,
        streamer=clock,
    )
    if tokenizer is not None:
        tokenizer.decode(made)
    peak = peak_resident_bytes()
    # Speed is measured as everywhere else, after a short prompt and when all has run once.
    short = max(1, min(_SHORT_PROMPT, context - num_new_tokens - 1))
    measured = {
        "peak_bytes": peak,
        "loaded_bytes": loaded,
        "tokens_per_second": tokens_per_second(model, context=short, num_tokens=num_new_tokens),
        "prefill_ms": clock.prefill_ms,
    }
    sys.stdout.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
