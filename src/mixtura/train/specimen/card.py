"""Write the specimen's card: `python -m mixtura.train.specimen.card`. Every figure in it is measured."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from mixtura.data.specimen import MODEL, path
from mixtura.errors import CheckpointError, UserError
from mixtura.train.specimen.card_text import card_text

NUM_PER_TASK = 100


def measure_card(directory: Path, num_per_task: int = NUM_PER_TASK) -> dict[str, Any]:
    """All figures of the card, measured on the checkpoint in `directory`.

    Raises:
        CheckpointError: where the directory has no `training.json`.
    """
    facts = directory / "training.json"
    if not facts.exists():
        raise CheckpointError(f"{facts} is missing; write the model with 'make specimen' first")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mixtura.data.text import comparability_warning
    from mixtura.train.specimen import measure

    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # float32 arithmetic on the bfloat16 weights: figures then do not depend on a processor's bfloat16
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    shares = measure.routed_shares(model, tokenizer)
    return {
        "training": json.loads(facts.read_text()),
        "checkpoint_bytes": sum(file.stat().st_size for file in directory.glob("*.safetensors")),
        "parameters": model.num_parameters(),
        "compression": measure.compression(model, tokenizer),
        "accuracy": measure.accuracy(model, tokenizer, num_per_task),
        "load": measure.load_by_layer(shares),
        "specialisation": measure.specialisation(shares),
        "text_warning": comparability_warning(),
        "minutes_to_measure": round((time.monotonic() - started) / 60, 1),
    }


def write_card(directory: Path, num_per_task: int = NUM_PER_TASK) -> None:
    """Measure the model in `directory` and write its `card.json` and `README.md`."""
    card = measure_card(directory, num_per_task)
    (directory / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    (directory / "README.md").write_text(card_text(card), encoding="utf-8")


def main() -> int:
    """Write the card of the shipped model, or of the directory given."""
    parser = argparse.ArgumentParser(prog="python -m mixtura.train.specimen.card", description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--num-per-task", type=int, default=NUM_PER_TASK)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    try:
        directory = path() if arguments.directory == MODEL else arguments.directory
        import torch

        torch.set_num_threads(arguments.threads)
        write_card(directory, arguments.num_per_task)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
