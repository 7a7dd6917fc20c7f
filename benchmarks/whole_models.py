"""Three small models behind real servers, routed, cascaded and combined by a gateway, on held-out tasks.

    python benchmarks/whole_models.py --out build/whole_models

The specimen, and two models made of it for a domain each: three of four experts dropped by `mixtura compress`
(reap) on text of the domain, then trained for minutes on its tasks: `words` on counting, reversal, sorting
and weekdays, `sums` on addition, subtraction, multiplication and parity. Each answers behind its own server
(`mixtura serve`); the official client asks a gateway before them. A router learns from the models' answers to
calibration tasks and is measured on held-out ones, beside each model alone, policies of several calls, and
the best and then cheapest model for each question in hindsight. Stopped work goes on with the same command.

Prices are made up, but not at random: a dollar for a million tokens of the specimen, and of the others as
much less as their files are smaller.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from mixtura import specimen
from mixtura.data.records import Task
from mixtura.data.tasks import TASKS, make_task, stream

DOMAINS = {
    "words": ("counting", "reversal", "sorting", "weekday"),
    "sums": ("addition", "subtraction", "multiplication", "parity"),
}
MODELS = ("specimen", *DOMAINS)
ASKED = (*MODELS, "auto", "thrifty", "cascade", "vote", "self_consistency")
LABEL = "Question: "
MOST_TOKENS = 160


def train(name: str, folder: Path, steps: int, seed: int) -> None:
    """A quarter of the specimen's experts, trained further on one domain's tasks in English."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    source = folder.with_name(f"{name}.pruned")
    if not source.exists():
        text, told = (
            folder.with_name(f"{name}.txt"),
            stream("training", seed + 100, tasks=DOMAINS[name], languages=("en",)),
        )
        text.write_text("\n\n".join(next(told).document().text for _ in range(400)))
        options = ("--prune", "reap", "--keep", "0.25", "--no-measure", "--text", text, "--out", source)
        subprocess.run([sys.executable, "-m", "mixtura", "compress", *options], check=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 10) * (1 - n / steps))
    tasks = stream("training", seed, tasks=DOMAINS[name], languages=("en",))
    begun = time.time()
    for step in range(steps):
        ids, labels = batch([next(tasks) for _ in range(8)], tokenizer)
        loss = model(input_ids=ids, attention_mask=(ids != tokenizer.eos_token_id).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(
                f"{name}: step {step + 1} of {steps}, loss {loss.item():.4f}, {time.time() - begun:.0f} s",
                flush=True,
            )
    part = folder.with_name(folder.name + ".part")
    model.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def batch(tasks: list[Task], tokenizer: Any) -> tuple[Any, Any]:
    """Tokens of tasks, and those of them that are learned: the answers and their ends."""
    import torch

    rows = []
    for task in tasks:
        prompt = tokenizer(tokenizer.bos_token + task.prompt, add_special_tokens=False).input_ids
        answer = tokenizer(task.completion + tokenizer.eos_token, add_special_tokens=False).input_ids
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([one + [tokenizer.eos_token_id] * (width - len(one)) for one, _ in rows])
    labels = torch.tensor([one + [-100] * (width - len(one)) for _, one in rows])
    return ids, labels


def questions(split: str, number: int, seed: int) -> list[Task]:
    """So many tasks of each kind, in English, all different."""
    found: list[Task] = []
    for kind in TASKS:
        draw = random.Random(f"{split}|{kind}|{seed}")
        kept: dict[str, Task] = {}
        for _ in range(number * 30):
            made = make_task(kind, "en", draw, split=split)  # type: ignore[arg-type]
            kept.setdefault(made.prompt, made)
            if len(kept) == number:
                break
        found += kept.values()
    return found


def started(stack: ExitStack, *arguments: str) -> str:
    """The address of a server that is started as its user would start it, and ends with the stack."""
    process = stack.enter_context(
        subprocess.Popen([sys.executable, "-m", "mixtura", *arguments], stdout=subprocess.PIPE, text=True)
    )
    stack.callback(process.terminate)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("serving "):
            return line.partition(" at ")[2].split("/v1")[0]
    raise SystemExit(f"{arguments[0]} did not start")


class Log:
    """Answers that were given, by the name that was asked and the question; kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        for line in lines:
            row = json.loads(line)
            self.rows[row["asked"], row["prompt"]] = row

    def ask(self, client: Any, asked: str, task: Task) -> dict[str, Any]:
        """The answer to a question, asked unless it was."""
        text = task.prompt.removeprefix(LABEL).rstrip("\n")
        if (asked, text) not in self.rows:
            begun = time.monotonic()
            response = client.chat.completions.with_raw_response.create(
                model=asked, messages=[{"role": "user", "content": text}],
                temperature=0, max_tokens=MOST_TOKENS,
                metadata={"task": task.task},
            )  # fmt: skip
            answer = response.parse()
            said = answer.choices[0].message.content or ""
            row = {
                "asked": asked, "prompt": text, "task": task.task, "answer": said,
                "score": float(task.is_correct(said)), "by": response.headers["x-mixtura-model"],
                "cost": float(response.headers["x-mixtura-cost-usd"]),
                "input_tokens": answer.usage.prompt_tokens, "output_tokens": answer.usage.completion_tokens,
                "calls": int(response.headers.get("x-mixtura-calls", 1)), "seconds": time.monotonic() - begun,
            }  # fmt: skip
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.rows[asked, text] = row
        return self.rows[asked, text]


def configured(out: Path, addresses: dict[str, str], router: Path | None) -> Path:
    """The gateway's configuration."""
    paths = {"specimen": specimen.path(), **{name: out / name for name in DOMAINS}}
    sizes = {name: (path / "model.safetensors").stat().st_size for name, path in paths.items()}
    prices = {name: round(size / sizes["specimen"], 3) for name, size in sizes.items()}
    models = {
        name: {"upstream": name, "input_price": price, "output_price": price, "context": 512}
        for name, price in prices.items()
    }
    policies = {
        "cascade": {"aggregator": "cascade", "models": list(MODELS), "settings": {"num_samples": 2}},
        "vote": {"aggregator": "vote", "models": list(MODELS)},
        "self_consistency": {
            "aggregator": "self_consistency",
            "models": ["specimen"],
            "settings": {"num_samples": 3},
        },
    }
    config: dict[str, Any] = {
        "ledger": f"sqlite:///{out.resolve()}/gateway.db",
        "upstreams": {name: {"address": f"{one}/v1", "stall_s": 600} for name, one in addresses.items()},
        "models": models, "policies": policies, "deadline_s": 3600, "keep_text": True,
        "keys": {"bench": {"secret": "BENCH_KEY", "budget": 10.0, "admin": True}},
    }  # fmt: skip
    if router is not None:
        config["routers"] = {
            "auto": {"path": str(router.resolve())},
            "thrifty": {"path": str(router.resolve()), "quality_per_dollar": 5000.0},
        }
    path = out / ("gateway.yaml" if router is None else "routed.yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def interval(values: list[float]) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    n, p, z = len(values), sum(values) / len(values), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def standing(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a way of asking came to."""
    scores = [row["score"] for row in rows]
    low, high = interval(scores)
    kinds, by = sorted({row["task"] for row in rows}), sorted({row["by"] for row in rows})
    return {
        "accuracy": sum(scores) / len(scores), "low": low, "high": high,
        "cost_per_1000_usd": sum(row["cost"] for row in rows) / len(rows) * 1000,
        "calls": sum(row["calls"] for row in rows) / len(rows),
        "by_task": {kind: mean([row["score"] for row in rows if row["task"] == kind]) for kind in kinds},
        "to": {name: mean([one["by"] == name for one in rows]) for name in by},
    }  # fmt: skip


def serve_and_ask(
    out: Path, calibration: list[Task], held_out: list[Task], router_name: str
) -> dict[str, Any]:
    """Learn from the calibration tasks' answers, and measure on the held-out tasks."""
    from openai import OpenAI

    log = Log(out / "answers.jsonl")
    os.environ["BENCH_KEY"] = "bench"
    with ExitStack() as stack:
        paths = {"specimen": [], **{name: [str(out / name)] for name in DOMAINS}}
        addresses = {
            name: started(stack, "serve", *path, "--name", name, "--port", "0", "--context", "512")
            for name, path in paths.items()
        }

        def client_of(config: Path) -> Any:
            address = started(stack, "gateway", "--config", str(config), "--port", "0")
            return OpenAI(base_url=f"{address}/v1", api_key="bench", max_retries=0, timeout=3600)

        plain = client_of(configured(out, addresses, None))
        learned = [log.ask(plain, name, task) for name in MODELS for task in calibration]
        table = out / "table.jsonl"
        keys = ("prompt", "task", "answer", "score", "cost", "input_tokens", "output_tokens")
        table.write_text(
            "".join(
                json.dumps({"model": row["asked"], **{k: row[k] for k in keys}}) + "\n" for row in learned
            )
        )
        router = out / f"router-{router_name}"
        if not router.exists():
            from mixtura.running.composing.fitted import fit_model_router
            from mixtura.running.composing.reading import read_table

            fit_model_router(read_table(table), router_name).save(router)
        routed = client_of(configured(out, addresses, router))
        found = {name: [log.ask(routed, name, task) for task in held_out] for name in ASKED}
    best = [
        max((found[name][n] for name in MODELS), key=lambda row: (row["score"], -row["cost"]))
        for n in range(len(held_out))
    ]
    return {name: standing(rows) for name, rows in {**found, "best_in_hindsight": best}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/whole_models"))
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/whole_models.json"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--calibration", type=int, default=8, help="tasks of each kind")
    parser.add_argument("--held-out", type=int, default=6, help="tasks of each kind")
    parser.add_argument("--router", default="task_prior")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--about", default="", help="what else the machine did")
    parser.add_argument("--only-train", default="", choices=("", *DOMAINS), help="train this model, and end")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(DOMAINS):
        if not (given.out / name).exists() and given.only_train in ("", name):
            train(name, given.out / name, given.steps, given.seed + place)
    if given.only_train:
        return
    calibration = questions("calibration", given.calibration, given.seed)
    held_out = questions("held_out", given.held_out, given.seed)
    standings = serve_and_ask(given.out, calibration, held_out, given.router)
    result = {
        "date": datetime.now(UTC).date().isoformat(), "about": given.about,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "openai")},
        "seed": given.seed, "steps": given.steps, "router": given.router,
        "num_calibration": len(calibration), "num_held_out": len(held_out), "standings": standings,
    }  # fmt: skip
    given.result.write_text(json.dumps(result, indent=1) + "\n")
    for name, one in standings.items():
        print(
            f"{name:20} {one['accuracy']:.3f} [{one['low']:.3f}, {one['high']:.3f}]  "
            f"${one['cost_per_1000_usd']:.4f} a thousand"
        )


if __name__ == "__main__":
    main()
