"""`mixtura compose` beside mergekit-moe: time, peak memory and loss, on the same dense models.

    python benchmarks/upcycle.py DIRECTORY --mergekit PYTHON

PYTHON is an interpreter of an environment that has mergekit (PyPI). Two things are made in DIRECTORY, if they
are not there. For size: three dense models of Llama 3.2 1B's width (2048, feed-forward 8192), four layers of
random weights in bfloat16. Where control groups of version 1 allow a limit of memory (as root), both run
under one smaller than a model's weights, too. For loss: a small dense model that is trained on text that
comes with mixtura, and three that are trained on from it, each on one domain; perplexity by domain is that of
held-out text, computed in the same way for all. Results go to `results/upcycle.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from layer import machine
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from mixtura import specimen
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data import text as data_text
from mixtura.data.tokens import encode_documents

RESULTS = Path(__file__).parent / "results" / "upcycle.json"
NAMES = ("prose", "code", "tasks")
SIZED = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096, "vocab_size": 32000,
}  # fmt: skip
SMALL = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 4096,
}  # fmt: skip
LENGTH, BATCH = 128, 16
# Gates that are drawn are refused without it.
_ANYWAY = ["--copy-tokenizer", "--i-understand-this-is-not-useful-without-training"]
_CGROUPS = Path("/sys/fs/cgroup/memory")


def make_sized(root: Path) -> list[Path]:
    """Three models of random weights and full width, which differ in their feed-forward parts."""
    paths = [root / f"sized-{name}" for name in NAMES]
    tokenizer = load_tokenizer(specimen.path())
    for number, path in enumerate(paths):
        if path.is_dir():
            continue
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZED))
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if number and ".mlp." in name:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(path, max_shard_size="500MB")
        tokenizer.save_pretrained(path)
    return paths


def make_small(root: Path, seconds: float) -> list[Path]:
    """A small model trained on all domains, and one of it for each domain, trained on."""
    paths = [root / f"small-{name}" for name in NAMES]
    if all(path.is_dir() for path in paths):
        return paths
    tokenizer = load_tokenizer(specimen.path())
    documents = data_text.calibration(4_000_000, seed=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    train(model, tokenizer, documents, seconds, 3e-3)
    model.save_pretrained(root / "small-base")
    tokenizer.save_pretrained(root / "small-base")
    for name, path in zip(NAMES, paths, strict=True):
        own = AutoModelForCausalLM.from_pretrained(root / "small-base")
        train(own, tokenizer, [d for d in documents if d.domain == name], seconds / 3, 1e-3)
        own.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


def train(
    model: Any, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Any], seconds: float, rate: float
) -> None:
    """Train on documents for so many seconds of processor time."""
    batch = encode_documents(documents, tokenizer, max_length=LENGTH)
    ids = batch.input_ids[batch.attention_mask.sum(1) == LENGTH]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    model.train()
    began, steps = time.process_time(), 0
    while (spent := time.process_time() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - 0.9 * spent / seconds)
        rows = ids[torch.randint(len(ids), (BATCH,), generator=generator)]
        loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    print(f"{steps} steps, loss {float(loss):.3f}", file=sys.stderr)


def prompts_of(paths: Sequence[Path]) -> dict[str, list[str]]:
    """Prompts by model: beginnings of calibration text of its domain."""
    documents = data_text.calibration(200_000, seed=2)
    return {
        path.name: [d.text[:300] for d in documents if d.domain == name][:8]
        for name, path in zip(NAMES, paths, strict=True)
    }


@contextmanager
def group(limit_bytes: int | None) -> Any:
    """A control group of memory with or without a limit; None where there is none."""
    folder = _CGROUPS / f"mixtura-benchmark-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        if limit_bytes is not None:
            (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield folder
    finally:
        folder.rmdir()


def timed(command: Sequence[str], limit_bytes: int | None = None) -> dict[str, Any]:
    """A command run to its end: seconds, and the peak of what is resident, files that it maps included."""
    peak = 0
    with group(limit_bytes) as folder, tempfile.TemporaryFile("w+") as said:
        enter = (
            [] if folder is None else ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(folder)]
        )
        began = time.monotonic()
        process = subprocess.Popen([*enter, *command], stdout=subprocess.DEVNULL, stderr=said)
        usage = None
        while usage is None:
            time.sleep(0.1)
            # Not the usage that the system hands over at the end, which counts whoever started it as well.
            peak = max(peak, high_water(process.pid))
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
            usage = used if ended else None
        code = os.waitstatus_to_exitcode(status)
        found: dict[str, Any] = {
            "seconds": round(time.monotonic() - began, 1),
            "processor_s": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_bytes": peak,
        }
        said.seek(0)
        lines = said.read().strip().splitlines()
    if code != 0:
        found["failed"] = "killed for memory" if code == -9 else (lines or ["nothing said"])[-1][:200]
    return found


def high_water(pid: int) -> int:
    """The most that a process has had resident; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0


def mixtura_command(paths: Sequence[Path], prompts: Path, out: Path, method: str) -> list[str]:
    """The composition by mixtura."""
    more = ["--prompts", str(prompts)] if method != "random_gates" else []
    models = [str(path) for path in paths]
    asked = ["--method", method, "--out", str(out), "--no-measure", "--top-k", "2"]
    return [sys.executable, "-m", "mixtura", "compose", *models, *asked, *more]


def mergekit_command(
    python: str, paths: Sequence[Path], prompts: Mapping[str, list[str]], out: Path, mode: str
) -> list[str]:
    """The same by mergekit-moe, whose configuration is written beside the result."""
    experts = [{"source_model": str(p), "positive_prompts": prompts[p.name]} for p in paths]
    config = {"base_model": str(paths[0]), "gate_mode": mode, "dtype": "bfloat16", "experts": experts}
    if "small" in paths[0].name:
        config["dtype"] = "float32"
    file = out.with_suffix(".yml")
    file.write_text(json.dumps(config | {"experts_per_token": 2}))
    # On a processor, as mixtura here.
    return [python, "-m", "mergekit.scripts.moe", str(file), str(out), "--device", "cpu", *_ANYWAY]


def perplexities(path: Path) -> dict[str, float]:
    """By domain, on the same held-out text, in float32 by plain transformers."""
    tokenizer = load_tokenizer(specimen.path())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = {}
    for name in NAMES:
        documents = [d for d in data_text.held_out(300_000, seed=0) if d.domain == name]
        batch = encode_documents(documents, tokenizer, max_length=LENGTH, max_tokens=4000)
        nats = count = 0.0
        for part in batch.split(2048):
            labels = part.input_ids.masked_fill(part.attention_mask == 0, -100)
            with torch.no_grad():
                loss = model(part.input_ids, attention_mask=part.attention_mask, labels=labels).loss
            number = float((labels[:, 1:] != -100).sum())
            nats, count = nats + float(loss) * number, count + number
        found[name] = float(torch.tensor(nats / count).exp())
    return {**found, "mean": sum(found.values()) / len(found)}


def sized_rows(root: Path, python: str) -> Iterator[dict[str, Any]]:
    """Both tools on models of full width, under a limit and without."""
    paths = make_sized(root)
    prompts = {name: own[:3] for name, own in prompts_of(paths).items()}
    file = root / "sized.json"
    file.write_text(json.dumps(prompts))
    weights = sum(f.stat().st_size for f in paths[0].glob("*.safetensors"))
    # Python, PyTorch and the embedding table take what they take, whatever the model.
    for limit in (int(0.9 * weights), None):
        for tool, make in (
            ("mixtura prompt_gates", lambda out: mixtura_command(paths, file, out, "prompt_gates")),
            ("mergekit hidden_avg", lambda out: mergekit_command(python, paths, prompts, out, "hidden_avg")),
        ):
            out = root / "out"
            row = {"tool": tool, "model_bytes": weights, "limit_bytes": limit, **timed(make(out), limit)}
            for left in (out, root / "out.work"):
                shutil.rmtree(left, ignore_errors=True)
            print(row, file=sys.stderr)
            yield row


def loss_rows(root: Path, python: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Perplexity by domain of small trained models, and of what is made of them."""
    paths = make_small(root, seconds)
    prompts = prompts_of(paths)
    file = root / "small.json"
    file.write_text(json.dumps(prompts))
    for path in (root / "small-base", *paths):
        yield {"model": path.name, "perplexity": perplexities(path)}
    for name, make in (
        ("mixtura prompt_gates", lambda out: mixtura_command(paths, file, out, "prompt_gates")),
        ("mixtura dume", lambda out: mixtura_command(paths, file, out, "dume")),
        ("mixtura embedding_gates", lambda out: mixtura_command(paths, file, out, "embedding_gates")),
        ("mixtura random_gates", lambda out: mixtura_command(paths, file, out, "random_gates")),
        ("mergekit hidden_avg", lambda out: mergekit_command(python, paths, prompts, out, "hidden_avg")),
        ("mergekit hidden", lambda out: mergekit_command(python, paths, prompts, out, "hidden")),
        ("mergekit cheap_embed", lambda out: mergekit_command(python, paths, prompts, out, "cheap_embed")),
        ("mergekit random", lambda out: mergekit_command(python, paths, prompts, out, "random")),
    ):
        out = root / "out"
        ran = timed(make(out))
        row: dict[str, Any] = {"model": name, "top_k": 2, **ran}
        if "failed" not in ran:
            row["perplexity"] = perplexities(out)
        shutil.rmtree(out, ignore_errors=True)
        print(row, file=sys.stderr)
        yield row


def main() -> None:
    """Run both and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mergekit", required=True, help="a python that has mergekit")
    parser.add_argument("--train", type=float, default=60.0, help="processor seconds to train the base for")
    parser.add_argument("--only", choices=["size", "loss"])
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    version = "import importlib.metadata as m; print(m.version('mergekit'), m.version('transformers'))"
    versions = subprocess.check_output([given.mergekit, "-c", version], text=True).split()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found |= {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "mergekit": versions[0],
        "mergekit_transformers": versions[1],
        "load": os.getloadavg()[0],
        "seed": 0,
    }
    wanted = {"size": sized_rows(given.directory, given.mergekit)} if given.only != "loss" else {}
    if given.only != "size":
        wanted["loss"] = loss_rows(given.directory, given.mergekit, given.train)
        found["trained_s"] = given.train
    for part, rows in wanted.items():
        found[part] = []
        for row in rows:
            # A row takes minutes: what is measured is kept.
            found[part].append(row)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
