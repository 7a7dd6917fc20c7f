"""The arena of adapters as a whole: what has no result yet is tuned, then all are compared."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from mixtura.data import specimen, tasks
from mixtura.data.examples import Example, read_examples
from mixtura.errors import UnknownNameError, UserError
from mixtura.methods import names as method_names
from mixtura.train.arena.paired import Row, judge, kept
from mixtura.train.sequences import Collator, ExampleSequences
from mixtura.train.tuning.arena.rows import BASELINES, REFERENCE, Entry, adapted, num_trained, sized
from mixtura.train.tuning.trainer import loss_on

Say = Callable[[str], None]
# Raised when a change makes earlier results not comparable.
VERSION: Final = 1
# Kinds of tasks that the specimen mostly fails, which are tuned on.
NEW: Final = ("sorting", "sequence")
LENGTH, PER_STEP = 256, 2
TOKENS_PER_STEP: Final = LENGTH * PER_STEP
COLUMNS: Final = ("loss", "others", "trained", "seconds_per_step")
_LEARNED, _HELD_OUT = 3000, 60


def hold(
    names: Sequence[str], num_seeds: int, num_steps: int, runs: Path, say: Say
) -> tuple[list[Row], dict[str, str]]:
    """Tune with what has no result yet, seed by seed, and compare; also who does not take part, and why.

    Args:
        names: of adapters; none means all. Baselines always take part.
        num_seeds: of the data's order and of what adapters begin as.
        num_steps: of each tuning.
        runs: where results of single runs are kept.
        say: told what is done.

    Raises:
        UnknownNameError: there is no such adapter.
    """
    known = method_names("adapters")
    for name in names:
        if name not in known:
            raise UnknownNameError("adapter in the arena", name, known)
    rows = {name: Row(name) for name in (*BASELINES, *(names or known))}
    absent: dict[str, str] = {}
    for seed in range(num_seeds):
        for name, row in rows.items():
            if name in absent:
                continue
            terms = {"version": VERSION, "name": name, "seed": seed, "steps": num_steps}
            file = runs / "adapters" / f"{name.replace(' ', '_')}-{num_steps}-{seed}.json"
            try:
                found = kept(file, terms, partial(measured, name, seed, num_steps))
            except UserError as error:
                absent[name] = str(error)
                say(f"{name} does not take part: {error}")
                continue
            row.runs.append(found)
            say(f"{name}, seed {seed}: held-out loss {found['loss']:.4f}")
    table = [row for name, row in rows.items() if name not in absent]
    for row in table:
        if row.name not in BASELINES:
            judge(row, rows[REFERENCE])
    return sorted(table, key=lambda row: row.mean("loss")), absent


def measured(name: str, seed: int, num_steps: int) -> dict[str, float]:
    """Tune once: losses on held-out answers of the new kinds of tasks and of the others, size and time.

    Raises:
        UserError: the method does not suit the specimen.
    """
    learned, held_out, others = (
        examples(split, seed, count, kinds)
        for split, count, kinds in (
            ("training", _LEARNED, NEW),
            ("held_out", _HELD_OUT, NEW),
            ("held_out", _HELD_OUT, tuple(kind for kind in tasks.TASKS if kind not in NEW)),
        )
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        entry = Entry(name) if name in BASELINES else sized(name, learned, seed)
        model = adapted(entry, learned, seed)
        seconds = tuned(model, learned, seed, num_steps, entry.rate) if num_trained(model) else 0.0
    model.eval()
    collator = Collator(1, apart=True)
    losses = [loss_on(model, ExampleSequences(one, LENGTH), collator, PER_STEP) for one in (held_out, others)]
    return {
        "loss": losses[0],
        "others": losses[1],
        "trained": num_trained(model),
        "seconds_per_step": seconds,
    }


def tuned(model: Any, learned: Sequence[Example], seed: int, num_steps: int, rate: float) -> float:
    """Train; the median processor time of a step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    sequences = ExampleSequences(learned, LENGTH, num_sequences=num_steps * PER_STEP, seed=seed)
    collator, times = Collator(1, apart=True), list[float]()
    before_step = getattr(getattr(model, "base_model", None), "before_step", None)
    model.train()
    for step in range(num_steps):
        began = time.process_time()
        batch = collator([sequences[step * PER_STEP + place] for place in range(PER_STEP)])
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5, (num_steps - step) / (num_steps / 2))
        model(**batch).loss.backward()
        if before_step is not None:
            before_step(step, num_steps)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.process_time() - began)
    return sorted(times)[len(times) // 2]


def examples(split: Any, seed: int, count: int, kinds: Sequence[str]) -> tuple[Example, ...]:
    """Tasks of some kinds as examples; held-out ones are the same for all seeds."""
    from mixtura.checkpoints.tokenizer import load_tokenizer

    stream = tasks.stream(split, seed if split == "training" else 0, tasks=tuple(kinds))
    lines = [json.dumps({"prompt": t.prompt, "completion": t.completion}) for t in islice(stream, count)]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        file.write_text("\n".join(lines), encoding="utf-8")
        return tuple(read_examples(file, load_tokenizer(specimen.path())))
