"""One run of the arena: train a model with one method and one seed, and measure it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from mixtura.errors import UserError
from mixtura.modeling.family import MixturaConfig, MixturaForCausalLM
from mixtura.train.arena.entries import REFERENCE, Entry, entries
from mixtura.train.arena.judge import Choices, balance, changed, judge, overhead, specialisation
from mixtura.train.arena.scale import Scale
from mixtura.train.arena.text import Text, labels_of
from mixtura.train.schedule import Decay, learning_rate_factor
from mixtura.train.text import Sequences, collate

WARMUP_SHARE, DECAY_SHARE = 0.05, 0.3
CLIP_NORM = 1.0
NUM_CHECKPOINTS = 5
# Raised when a change makes earlier results not comparable.
VERSION = 2

Notify = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training: an entry, a seed and a number of steps."""

    kind: str
    entry: Entry
    seed: int
    num_steps: int
    scale: Scale = field(default_factory=Scale)

    @property
    def digest(self) -> str:
        """What the result depends on; a result of another digest is made again."""
        described = [VERSION, dict(self.entry.model), asdict(self.scale), self.seed, self.num_steps]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    def file(self, directory: Path) -> Path:
        """Where its result is kept; those of baselines serve every kind."""
        group = "baselines" if self.entry.baseline else self.kind
        return directory / group / f"{self.entry.name}-{self.seed}.json"


def result_of(run: Run, directory: Path) -> dict[str, Any] | None:
    """A run's kept result; None where there is none, or one of another training."""
    file = run.file(directory)
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("digest") == run.digest else None


def perform(run: Run, text: Text, directory: Path) -> dict[str, Any]:
    """Do a run and keep its result, whole or not at all; what a method refuses is its result."""
    start = time.perf_counter()
    try:
        values = measure(run, text)
    except UserError as error:
        values = {"error": " ".join(str(error).split())}
    except (RuntimeError, FloatingPointError) as error:
        values = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    result = {
        "digest": run.digest,
        "name": run.entry.name,
        "seed": run.seed,
        "num_steps": run.num_steps,
        "seconds": round(time.perf_counter() - start, 1),
        **values,
    }
    file = run.file(directory)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)
    return result


def make_model(
    model: Mapping[str, Any], vocab_size: int, seed: int, scale: Scale | None = None
) -> MixturaForCausalLM:
    """A fresh model of the arena."""
    config = MixturaConfig(**{**(scale or Scale()).config, **model}, vocab_size=vocab_size, seed=seed)
    return MixturaForCausalLM(config)


def measure(run: Run, text: Text) -> dict[str, Any]:
    """Train and measure; the numbers of one row.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model = make_model(run.entry.model, text.vocab_size, run.seed, run.scale)
    every = max(1, run.num_steps // NUM_CHECKPOINTS)
    seen: list[Choices] = []
    curve: list[float] = []

    def look(step: int) -> None:
        if step % every == 0 and step < run.num_steps:
            found = judge(model, text.held_out)
            seen.append(found.choices)
            curve.append(round(sum(found.bits) / len(found.bits), 5))

    _train(model, run, text, look)
    last = judge(model, text.held_out)
    changes = [changed(a, b) for a, b in zip(seen, [*seen[1:], last.choices], strict=False)]
    (reference,) = entries("routers", 1, (REFERENCE,), run.scale)
    plain = make_model(reference.model, text.vocab_size, run.seed, run.scale)
    more, ratio = overhead(model, plain, text.held_out)
    values: dict[str, Any] = {
        "bits_per_byte": sum(last.bits) / len(last.bits),
        "by_domain": dict(zip(text.streams, last.bits, strict=True)),
        "curve": curve,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "experts_per_token": last.experts_per_token,
        "overhead_us": more,
        "time_ratio": ratio,
        "leaks": run.entry.leaks,
    }
    on_grids = len(model.model.places) > len(model.model.blocks)
    if on_grids or (run.kind == "mixers" and not run.entry.baseline):
        values["experts_per_token"] = None
    if last.loads is not None:
        values |= balance(last.loads)
        values |= {
            "specialisation": specialisation(last.loads),
            "fluctuation": sum(changes) / max(len(changes), 1),
        }
    return values


def _train(model: MixturaForCausalLM, run: Run, text: Text, look: Callable[[int], None]) -> None:
    scale = run.scale
    data = Sequences(text.streams, run.num_steps * scale.num_sequences, scale.sequence_length, run.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=scale.learning_rate, betas=(0.9, 0.95), fused=True)
    num_decay = max(1, round(run.num_steps * DECAY_SHARE))
    decay = Decay(run.num_steps - num_decay, num_decay)
    model.train()
    for step in range(run.num_steps):
        look(step) if step else None
        factor = learning_rate_factor(step, max(1, round(run.num_steps * WARMUP_SHARE)), decay)
        for group in optimizer.param_groups:
            group["lr"] = scale.learning_rate * factor
        first = step * scale.num_sequences
        batch = collate([data[first + n] for n in range(scale.num_sequences)])
        batch["token_labels"] = labels_of(batch["token_labels"]["domain"])
        loss = model(**batch).loss
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step} is not finite")
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        model.end_step()
        optimizer.zero_grad(set_to_none=True)
