"""RouteLLM's protocol on its own table: whether a prompt goes to the weak or the strong of two models.

    python benchmarks/routellm.py RouteLLM/routellm/evals

The directory is that of the repository lm-sys/RouteLLM (Apache-2.0): 57 subjects of MMLU, answered by
Mixtral-8x7B and GPT-4. Nothing is downloaded. As there, contaminated prompts are left out, thresholds are the
deciles of how much a router prefers the strong model, and APGR is the area under the gap that is recovered
over the share of strong calls: 0 is the weak model, 1 the strong one throughout, 0.5 random choice; more than
1 is possible, as the weak model is right where the strong one is not.

Learned routers are fitted on half of the prompts and measured on the other; the rows of RouteLLM's own
routers, which were trained on other data, need their weights and are not measured here.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from mixtura.running.composing.fitted import fit_model_router
from mixtura.running.composing.tables import make_table, split
from mixtura.types.models import ModelCard, Outcome, Prompt

WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
ROUTERS = ("task_prior", "knn", "uniroute", "logistic", "matrix_factorization", "entity_graph")


def read(folder: Path) -> list[tuple[str, str, bool, bool]]:
    """Prompt, subject, and whether the weak and the strong model were right."""
    lines = (folder / "mmlu/contaminated_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    left_out = {json.loads(line)["eval_prompt"] for line in lines if line.strip()}
    rows = []
    for path in sorted((folder / "mmlu/responses").glob("mmlu_*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["prompt"] not in left_out:
                    right = (row[WEAK] == "True", row[STRONG] == "True")
                    rows.append((row["prompt"], path.stem.removeprefix("mmlu_"), *right))
    return rows


def apgr(preferred: np.ndarray, weak: np.ndarray, strong: np.ndarray, num: int = 10) -> float:
    """The area under the share of the gap that is recovered, over the share of strong calls."""
    gap = strong.mean() - weak.mean()
    points = []
    for place, threshold in enumerate(np.quantile(preferred, np.linspace(0, 1, num + 1))):
        chosen = preferred > threshold if place == num else preferred >= threshold
        points.append((chosen.mean(), (np.where(chosen, strong, weak).mean() - weak.mean()) / gap))
    points.append((0.0, 0.0))
    ordered = np.array(sorted(points))
    return float(np.trapezoid(ordered[:, 1], ordered[:, 0]))


def oracle(weak: np.ndarray, strong: np.ndarray, num: int = 10) -> float:
    """The same where the strong model is asked what it alone knows, and nothing that the weak one knows."""
    gap = strong.mean() - weak.mean()
    only = (strong & ~weak).mean()
    shares = np.linspace(0, 1, num + 1)
    return float(np.trapezoid(np.minimum(shares, only) / gap, shares))


def learned(rows: Sequence[tuple[str, str, bool, bool]], name: str, seed: int) -> float:
    """A router that learns from half of the prompts, on the other half."""
    cards = (ModelCard(name="strong"), ModelCard(name="weak"))
    prompts = [
        Prompt(id=str(n), text=text, labels={"task": task}) for n, (text, task, _, _) in enumerate(rows)
    ]
    outcomes = [
        Outcome(prompt=str(n), model=model, score=float(right), cost=cost)
        for n, (_, _, weak, strong) in enumerate(rows)
        for model, right, cost in (("weak", weak, 1.0), ("strong", strong, 10.0))
    ]
    train, test = split(make_table(prompts, cards, outcomes), 0.5, f"routellm {seed}")
    router = fit_model_router(train, name)
    scores = router.scores(test.prompts)
    places = {card.name: place for place, card in enumerate(router.cards)}
    preferred = scores.quality[:, places["strong"]] - scores.quality[:, places["weak"]]
    columns = {own: test.scores[:, test.names.index(own)].astype(bool) for own in ("weak", "strong")}
    return apgr(preferred, columns["weak"], columns["strong"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--routers", nargs="*", default=ROUTERS)
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/routellm.json"))
    given = parser.parse_args()
    rows = read(given.folder)
    weak, strong = (np.array([row[place] for row in rows]) for place in (2, 3))
    draw = np.random.default_rng(0)
    random = [apgr(draw.random(len(rows)), weak, strong) for _ in range(200)]
    subjects = {
        task: np.mean([row[3] - row[2] for row in rows if row[1] == task])
        for task in {row[1] for row in rows}
    }
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "num_prompts": len(rows), "weak": float(weak.mean()), "strong": float(strong.mean()),
        "either": float((weak | strong).mean()), "random": mean(random), "random_spread": stdev(random),
        "oracle": oracle(weak, strong),
        "subjects_in_hindsight": apgr(np.array([subjects[row[1]] for row in rows]), weak, strong),
        "learned": {},
    }  # fmt: skip
    for name in given.routers:
        values = [learned(rows, name, seed) for seed in range(given.seeds)]
        result["learned"][name] = {"apgr": mean(values), "spread": stdev(values)}
        given.result.write_text(json.dumps(result, indent=1) + "\n")
        print(name, values, flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
