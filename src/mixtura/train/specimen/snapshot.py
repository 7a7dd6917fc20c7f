"""Write a training of the specimen as an ordinary transformers checkpoint, finished or absent."""

from __future__ import annotations

import json
import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mixtura.machine.processor import processor_name

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + 'Question: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def snapshot(training: Path, target: Path) -> None:
    """Write what a training of `mixtura train` came to, replacing what is in `target`.

    The checkpoint is a Qwen3-MoE in bfloat16, in one shard, with one tensor for each expert's projection,
    the tokenizer, the generation config and `training.json`, which says how it was trained.

    Raises:
        UnsupportedModelError: the model has parts that no Qwen3-MoE has.
    """
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.modeling.export import exported
    from mixtura.modeling.family import MixturaForCausalLM
    from mixtura.train.run import MODEL

    model = exported(MixturaForCausalLM.from_pretrained(training / MODEL))
    # The loss of transformers, which pools layers, was not trained with.
    model.config.router_aux_loss_coef = 0.0
    model.generation_config.max_new_tokens = 200
    aside = target.with_name(target.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(aside)
    tokenizer = load_tokenizer(training / MODEL)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(aside)
    (aside / "training.json").write_text(json.dumps(training_facts(training), indent=1) + "\n")
    for file in aside.iterdir():
        file.chmod(0o644)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def training_facts(training: Path) -> dict[str, Any]:
    """How a model was trained: seed, steps, tokens, hours, hardware, versions."""
    import transformers

    from mixtura.train.log import METRICS
    from mixtura.train.run import known

    config = known(training) or {}
    steps = config["training"]
    last = json.loads((training / METRICS).read_text(encoding="utf-8").splitlines()[-1])
    per_step = steps["num_sequences"] * steps["num_accumulated"] * config["data"]["sequence_length"]
    return {
        "seed": config["seed"],
        "steps": steps["num_steps"],
        "decay_start": steps["num_steps"] - steps["decay_steps"],
        "decay_steps": steps["decay_steps"],
        "tokens": steps["num_steps"] * per_step,
        "tokens_per_step": per_step,
        "hours": round(last["seconds"] / 3600, 2),
        "text_sha256": config["text_sha256"],
        "hardware": f"{os.cpu_count()} cores, {processor_name()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
