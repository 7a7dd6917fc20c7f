"""Tune the specimen on two kinds of tasks that it mostly fails, with several adapters of about equal size.

Each row is a process of its own on one core: the same sequences in the same order, as many steps, AdamW. What
is told of each: exact matches on held-out tasks of the two kinds and on all other kinds (what is forgotten),
the loss on held-out answers, trained parameters, CPU seconds a step, peak memory of the process.

    python benchmarks/tune.py                         # all rows, about 15 minutes on one free core
    python benchmarks/tune.py --rows expert_lora      # rows whose names begin so; the others are kept
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results/tune.json"
NEW = ("sorting", "sequence")
LENGTH, PER_STEP, SEED = 256, 2, 0

# By row: what makes it, its settings, its learning rate.
ROWS: dict[str, tuple[str, dict[str, Any], float]] = {
    "no tuning": ("none", {}, 0.0),
    "expert_lora, rank 4": ("expert_lora", {"rank": 4, "alpha": 8.0}, 2e-3),
    "expert_lora, rank 24, experts by gate": (
        "expert_lora", {"rank": 24, "alpha": 48.0, "score": "gate", "top_p": 0.25}, 2e-3
    ),
    "esft, one expert a layer": ("esft", {"top_p": 0.01}, 5e-4),
    "PEFT LoRA on attention, rank 64": ("peft attention", {"r": 64, "lora_alpha": 128}, 2e-3),
    "PEFT LoRA on experts, rank 4": ("peft experts", {"r": 4, "lora_alpha": 8}, 2e-3),
}  # fmt: skip


def examples(split: str, count: int) -> list[Any]:
    """Tasks of the new kinds as examples."""
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.data import specimen, tasks
    from mixtura.data.examples import read_examples

    made = islice(tasks.stream(split, SEED, tasks=NEW), count)  # type: ignore[arg-type]
    lines = [json.dumps({"prompt": one.prompt, "completion": one.completion}) for one in made]
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"tune-{os.getpid()}.jsonl"
    file.write_text("\n".join(lines))
    try:
        return list(read_examples(file, load_tokenizer(specimen.path())))
    finally:
        file.unlink()


def adapted(kind: str, settings: dict[str, Any], learned: list[Any]) -> Any:
    """The specimen with what a row puts on it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import mixtura
    from mixtura.data import specimen
    from mixtura.train.tuning.run import first_tokens

    if kind.startswith("peft"):
        model = AutoModelForCausalLM.from_pretrained(specimen.path(), dtype=torch.float32)
        where: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        if kind == "peft experts":
            parameters = ["experts.gate_up_proj", "experts.down_proj"]
            where = {"target_modules": [], "target_parameters": parameters}
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings, **where))
    model = mixtura.load(specimen.path(), dtype=torch.float32)
    if kind == "none":
        return model
    config = mixtura.AdapterConfig(method=kind, settings=settings, task_type="CAUSAL_LM")
    if settings.get("score", "token" if kind == "esft" else "all") != "all":
        config = config.chosen_from(
            mixtura.observe(model, first_tokens(learned, 8192, LENGTH), progress=False)
        )
    return get_peft_model(model, config)


def measure(name: str, steps: int, per_kind: int) -> dict[str, Any]:
    """One row, in this process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.data import specimen, tasks
    from mixtura.running.evaluate import task_accuracy
    from mixtura.train.sequences import Collator, ExampleSequences
    from mixtura.train.tuning.trainer import loss_on

    kind, settings, rate = ROWS[name]
    learned, held_out = examples("training", 3000), examples("held_out", 60)
    model = adapted(kind, settings, learned)
    collator = Collator(1, apart=True)
    sequences = ExampleSequences(learned, LENGTH, num_sequences=steps * PER_STEP, seed=SEED)
    trained = [p for p in model.parameters() if p.requires_grad] if kind != "none" else []
    seconds = 0.0
    if trained:
        seconds = train(model.train(), trained, sequences, collator, steps, rate)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.eval()
    loss = loss_on(model, ExampleSequences(held_out, LENGTH), collator, PER_STEP)
    tokenizer, asked = load_tokenizer(specimen.path()), tasks.sample("held_out", per_kind, SEED)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    found = task_accuracy(model, tokenizer, asked)
    counts: dict[bool, list[int]] = {True: [0, 0], False: [0, 0]}
    for task, by_language in found.items():
        for right, total in by_language.values():
            counts[task in NEW][0] += right
            counts[task in NEW][1] += total
    return {
        "row": name,
        "trained": sum(p.numel() for p in trained),
        "learning_rate": rate,
        "steps": steps if trained else 0,
        "seconds_per_step": seconds,
        "peak_bytes": peak,
        "eval_loss": loss,
        "new": counts[True],
        "others": counts[False],
    }


def train(model: Any, trained: list[Any], sequences: Any, collator: Any, steps: int, rate: float) -> float:
    """Train; the median CPU time of a step."""
    import torch

    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    times = []
    for step in range(steps):
        began = time.process_time()
        batch = collator([sequences[step * PER_STEP + place] for place in range(PER_STEP)])
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5, (steps - step) / (steps / 2))
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.process_time() - began)
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Measure rows, each in its own process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=None)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tasks", type=int, default=40, help="held-out tasks of each kind")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.steps, given.tasks)))
        return
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {row["row"]: row for row in kept}
    for name in ROWS:
        if given.rows is not None and not any(name.startswith(begin) for begin in given.rows):
            continue
        command = [sys.executable, __file__, "--one", name, "--steps", str(given.steps)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*command, "--tasks", str(given.tasks)], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(rows[name]), flush=True)
        ordered = [rows[one] for one in ROWS if one in rows]
        kept_now = {"date": datetime.now(UTC).date().isoformat(), "rows": ordered}
        RESULTS.write_text(json.dumps(kept_now, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
