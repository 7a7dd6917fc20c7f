"""What is measured of a smaller model: its loss beside the original's, its answers, its own words."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.checkpoints.applying.merging import merged_expert
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.checkpoints.view import MemoryView, drop_experts
from mixtura.data.text import held_out_tasks
from mixtura.data.tokens import num_embeddings_of
from mixtura.fitting.quality import ALL, HeldOut, Scores, join, score_chunk, summarise
from mixtura.fitting.texts import load_texts
from mixtura.running.decoding import decoding_config
from mixtura.running.evaluate import task_accuracy
from mixtura.running.loading import load
from mixtura.types import Plan

# Raised when a change makes earlier results not comparable.
VERSION = 1
_BATCH_TOKENS = 2048
# Logits of the original are kept up to this size; of larger models they are made again each time.
_KEPT_BYTES = 1 << 30


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is asked.

    Attributes:
        length: tokens of a sequence at most.
        held_out_tokens: tokens of plain text, and of questions with answers, as many of each domain.
        tasks: questions of each task that are answered freely.
        prompts: passages that are continued.
        prompt_tokens, new_tokens: of each of these.
    """

    length: int = 512
    held_out_tokens: int = 6144
    tasks: int = 4
    prompts: int = 16
    prompt_tokens: int = 32
    new_tokens: int = 32


@final
class Exam:
    """Measures plans on a model that stays in memory, in float32; everything is greedy and repeatable.

    Args:
        path: a checkpoint with plain experts and a tokenizer.
        sizes: how much is asked.
        seed: of the choice of held-out text and tasks.
    """

    def __init__(self, path: Path, sizes: Sizes, seed: int) -> None:
        self.sizes = sizes
        self.model = load(path, dtype=torch.float32)
        self._tokenizer = load_tokenizer(path)
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or sizes.length
        texts = load_texts(
            None,
            self._tokenizer,
            length=min(sizes.length, positions),
            calibration_tokens=1,
            held_out_tokens=sizes.held_out_tokens,
            seed=seed,
            num_embeddings=num_embeddings_of(self.model.config),
        )
        self._held_out = texts.held_out
        self._tasks = held_out_tasks(sizes.tasks, seed)
        tasks = hashlib.sha256("".join(one.prompt for one in self._tasks).encode()).hexdigest()
        named = [VERSION, checkpoint_digest(path), self._text_digest(), tasks, asdict(sizes)]
        self.digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
        self._reference: list[Tensor] | None = None
        self._words: Int[Tensor, "S T"] | None = None

    def _text_digest(self) -> str:
        """What names the held-out text; calibration text may differ and does not belong in it."""
        digest = hashlib.sha256()
        for part in self._held_out:
            digest.update(part.input_ids.numpy().tobytes() + part.answers.numpy().tobytes())
        return digest.hexdigest()

    def loss(self, plan: Plan) -> dict[str, Any]:
        """`scored` of the model as a plan leaves it."""
        return self.scored(self._pruned(plan))

    def scored(self, changed: Any) -> dict[str, Any]:
        """KL divergence to the original, perplexity, equal top tokens and exact answers, by domain."""
        started = time.perf_counter()
        scored = []
        references = self._references()
        for part in self._held_out:
            chunks: list[Scores] = []
            for (logits, targets), reference in zip(_predictions(changed, part), references, strict=False):
                chunks.append(score_chunk(reference, logits, targets))
            scored.append((join(chunks), part))
        quality = summarise(scored, 0.0)
        return {
            "kl": quality.kl,
            "equal_top": quality.equal_top,
            "kl_by_domain": {name: one for name, one in quality.kl_by_domain.items() if name != ALL},
            "perplexity": dict(quality.perplexity),
            "exact_answers": quality.accuracy.get(ALL),
            "loss_seconds": round(time.perf_counter() - started, 1),
        }

    def words(self, plan: Plan) -> dict[str, Any]:
        """Tasks answered right, and how much of the original's continuations is written alike."""
        started = time.perf_counter()
        pruned = self._pruned(plan)
        if self._words is None:
            self._words = self._continued(self.model)
        alike = (self._continued(pruned) == self._words).cumprod(1).double().mean()
        counts = task_accuracy(pruned, self._tokenizer, self._tasks)
        right, total = (sum(one[i] for task in counts.values() for one in task.values()) for i in (0, 1))
        return {
            "agreement": float(alike),
            "task_accuracy": right / total,
            "words_seconds": round(time.perf_counter() - started, 1),
        }

    def _pruned(self, plan: Plan) -> Any:
        if not plan.actions:
            return self.model
        return drop_experts(_tied(copy.deepcopy(self.model), plan), plan.dropped())

    def _references(self) -> Iterator[Float[Tensor, "P V"]]:
        """The original's logits, part by part and batch by batch, as `_predictions` gives them."""
        made = (logits for part in self._held_out for logits, _ in _predictions(self.model, part))
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        positions = sum(int(part.predicted.sum()) for part in self._held_out)
        if 4 * positions * vocabulary > _KEPT_BYTES:
            return made
        if self._reference is None:
            self._reference = list(made)
        return iter(self._reference)

    @torch.no_grad()
    def _continued(self, model: Any) -> Int[Tensor, "S T"]:
        """What a model writes after the first tokens of held-out passages."""
        sizes = self.sizes
        rows = [p.input_ids[p.attention_mask.sum(1) >= sizes.prompt_tokens] for p in self._held_out[:1]]
        prompts = rows[0][: sizes.prompts, : sizes.prompt_tokens]
        config = decoding_config(model, max_new_tokens=sizes.new_tokens, pad_token_id=0)
        made: Tensor = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config
        )
        # Where all have ended early, the rest is padding as it is where some have.
        return F.pad(made, (0, sizes.prompt_tokens + sizes.new_tokens - made.shape[1]))[
            :, sizes.prompt_tokens :
        ]


@torch.no_grad()
def _tied(model: Any, plan: Plan) -> Any:
    """The model with every member of a merged group replaced by what the group becomes."""
    view = MemoryView(model)
    for index, merges in plan.merged().items():
        layer = view.layer(index)
        module = model.get_submodule(layer.name)
        for merge in merges:
            made = merged_expert(layer, merge)
            for name, tensor in zip(layer.layout.parameters, made, strict=False):
                assert tensor is not None
                getattr(module, name)[list(merge.experts)] = tensor
    return model


def _predictions(model: Any, part: HeldOut) -> Iterator[tuple[Float[Tensor, "P V"], Int[Tensor, " P"]]]:
    """Logits of the judged positions and the tokens that really followed, a batch at a time."""
    rows = max(1, _BATCH_TOKENS // part.input_ids.shape[1])
    targets = part.input_ids.roll(-1, 1)
    for chosen in torch.arange(part.input_ids.shape[0]).split(rows):
        mask, wanted = part.attention_mask[chosen], part.predicted[chosen]
        # Not around the whole: a generator would leave its caller without gradients between batches.
        with torch.no_grad():
            logits = model(input_ids=part.input_ids[chosen], attention_mask=mask, use_cache=False).logits
        yield logits[wanted].float(), targets[chosen][wanted]
