"""Two specialists of one tokenizer as one model: each way of composing them, on text of both domains.

    python benchmarks/ensembles.py --out build/ensembles --seeds 0 1 2

The specialists are a quarter of the specimen each: three of four experts dropped by `mixtura compress`
(reap) on calibration text of one domain, code or prose, then trained on that text for some steps. What is
foretold is held-out text: of each domain, and pieces that go from one domain to the other (`switching`), the
first 16 tokens given. What trains something is trained on calibration text of both domains, and learns its
preferences from pairs of how a text goes on and how another one of its domain does. Losses are nats a token.
Each seed trains its own specialists; stopped work goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mixtura import specimen
from mixtura.data.text import calibration, held_out
from mixtura.methods import create
from mixtura.running.ensembling.lessons import Pair, Row, in_turn, lesson_of, rows_of
from mixtura.running.ensembling.scoring import score
from mixtura.running.ensembling.team import Team, team_of
from mixtura.running.ensembling.training import Training, train

DOMAINS = ("code", "prose")
LENGTH, PROMPT, NUM_HELD_OUT, NUM_PAIRS, BATCH = 88, 16, 32, 32, 4
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean of logits": ("mean_logits", {}),
    "mean of probabilities": ("bayes_mixture", {"switching": 1.0}),
    "Bayes mixture": ("bayes_mixture", {}),
    "Bayes mixture, switching 0.02": ("bayes_mixture", {"switching": 0.02}),
    "FusionRoute, first stage": ("fusion_route", {}),
    "FusionRoute, both stages": ("fusion_route", {}),
    "FusionRoute, first stage, tunes=sum": ("fusion_route", {"tunes": "sum"}),
    "Mixture of Thoughts": ("mixture_of_thoughts", {"stacks": 2}),
}


def pruned(domain: str, folder: Path) -> Path:
    """A quarter of the specimen's experts, those that a domain's text needs most."""
    path = folder / f"{domain}.pruned"
    if not path.exists():
        text = folder / f"{domain}.txt"
        text.write_text("\n\n".join(one.text for one in calibration(60_000, domains=(domain,))))
        options = (
            "--prune",
            "reap",
            "--keep",
            "0.25",
            "--no-measure",
            "--text",
            str(text),
            "--out",
            str(path),
        )
        subprocess.run([sys.executable, "-m", "mixtura", "compress", *options], check=True)
    return path


def specialist(domain: str, seed: int, steps: int, folder: Path) -> PreTrainedModel:
    """A quarter of the specimen, trained on one domain's text."""
    path = folder / f"{domain}-{seed}"
    if not path.exists():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(pruned(domain, folder), dtype=torch.float32).train()
        team = Team((model,), AutoTokenizer.from_pretrained(specimen.path()), (domain,))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
        batches = in_turn(pieces(team, "training", domain)[::2], 2 * BATCH, seed)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 5e-4 * min(1, (step + 1) / 5) * (1 - step / steps)
            lesson = lesson_of([replace(row, num_prompt=1) for row in next(batches)], team)
            said = model(input_ids=lesson.text.token_ids, attention_mask=lesson.text.valid).logits
            loss = torch.nn.functional.cross_entropy(said.flatten(0, 1).float(), lesson.targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            print(f"{domain} {seed}: step {step + 1} of {steps}, loss {loss.item():.4f}", flush=True)
        part = path.with_name(path.name + ".part")
        model.save_pretrained(part)
        part.rename(path)
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return found


def pieces(team: Team, split: str, domain: str) -> list[Row]:
    """Pieces of a domain's text, all of the same length."""
    take = held_out if split == "held_out" else calibration
    documents = take(160_000, domains=(domain,))
    found = rows_of(documents, team, length=LENGTH, num_prompt=PROMPT)
    return [row for row in found if len(row.token_ids) == LENGTH]


def foretold(team: Team, seed: int) -> list[Row]:
    """Held-out pieces of each domain, and halves of both in one, in either order."""
    draw = random.Random(seed)
    code, prose = (draw.sample(pieces(team, "held_out", one), NUM_HELD_OUT) for one in DOMAINS)
    half = LENGTH // 2
    for place, both in enumerate(zip(code[: NUM_HELD_OUT // 2], prose, strict=False)):
        first, second = both if place % 2 else both[::-1]
        code.append(Row(first.token_ids[:half] + second.token_ids[-half:], PROMPT, "switching"))
    return code + prose


def pairs(rows: Sequence[Row], seed: int) -> list[Pair]:
    """How texts go on, each preferred to how another text of the domain does."""
    made = []
    draw = random.Random(f"pairs|{seed}")
    for row in draw.sample(list(rows), NUM_PAIRS):
        other = draw.choice([one for one in rows if one.domain == row.domain and one is not row])
        made.append(Pair(row, replace(row, token_ids=row.token_ids[:PROMPT] + other.token_ids[PROMPT:])))
    return made


def measure(seed: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All ways with one seed's specialists."""
    models = [specialist(domain, seed, arguments.steps, folder) for domain in DOMAINS]
    tokenizer = AutoTokenizer.from_pretrained(specimen.path())
    team = team_of(models, [tokenizer] * 2, tuple(DOMAINS))
    rows = foretold(team, seed)
    # Other pieces than those that the specialists were trained on.
    lessons = [row for domain in DOMAINS for row in pieces(team, "training", domain)[1::2]]
    base = AutoModelForCausalLM.from_pretrained(specimen.path(), dtype=torch.float32)
    found: dict[str, Any] = {"seed": seed, "ways": {}}
    for way, (name, settings) in WAYS.items():
        method, begun, stages = create("ensembles", name, **settings), time.process_time(), []
        of = team.with_own(method)
        if method.stages:
            how = Training(
                steps=arguments.train_steps,
                batch=BATCH,
                learning_rate=2e-3,
                own_learning_rate=2e-4,
                seed=seed,
            )
            known = pairs(lessons, seed) if "both" in way else []
            stages = [[one.name, one.first, one.last] for one in train(method, of, lessons, how, known)]
        said = score(method, of, rows, 8)
        found["ways"][way] = {
            "losses": said.losses, "shares": said.shares, "stages": stages,
            "processor_seconds": time.process_time() - begun,
        }  # fmt: skip
        print(seed, way, {key: round(one, 4) for key, one in said.losses.items()}, flush=True)
    found |= {
        "alone": said.alone, "best_by_text": said.best_by_text, "best_by_token": said.best_by_token,
        "tokens": said.num_tokens,
    }  # fmt: skip
    plain = score(
        create("ensembles", "mean_logits"), Team((base, base), tokenizer, ("specimen",) * 2), rows, 8
    )
    return found | {"specimen": plain.losses}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Means over seeds with standard deviations, as Markdown."""
    domains = (*DOMAINS, "switching", "all")
    rows: list[tuple[str, list[dict[str, float]]]] = [("the whole specimen", [r["specimen"] for r in runs])]
    for place, name in enumerate(DOMAINS):
        rows.append((f"`{name}` alone", [{d: r["alone"][d][place] for d in domains} for r in runs]))
    rows += [(way, [r["ways"][way]["losses"] for r in runs]) for way in WAYS if way in runs[0]["ways"]]
    rows.append(("best model for each text, in hindsight", [r["best_by_text"] for r in runs]))
    rows.append(("best model for each token, in hindsight", [r["best_by_token"] for r in runs]))
    lines = [f"| | {' | '.join(domains)} |", "|---|" + "---|" * len(domains)]
    for name, found in rows:
        cells = []
        for domain in domains:
            values = [one[domain] for one in found]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20, help="of each specialist")
    parser.add_argument("--train-steps", type=int, default=30, help="of each stage of an ensemble")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in arguments.seeds:
        path = arguments.out / f"seed-{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(measure(seed, arguments.out, arguments)))
        runs.append(json.loads(path.read_text()))
    kept = {
        "date": datetime.now(UTC).date().isoformat(), "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(), "versions": {one: version(one) for one in ("torch", "transformers")},
        "steps": arguments.steps, "train_steps": arguments.train_steps, "runs": runs,
    }  # fmt: skip
    (arguments.out / "ensembles.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
