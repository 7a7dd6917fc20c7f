"""The arena of caches: a model's choices, recorded on text, through every cache at several sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.checkpoints.view import open_model
from mixtura.data.text import held_out
from mixtura.data.tokens import encode_documents, num_embeddings_of
from mixtura.errors import UnknownNameError
from mixtura.methods import create, header, own_names
from mixtura.methods.caches import Cache, Call, Key
from mixtura.running.loading import load

# What every other cache is measured by: the best that is possible, and the usual one.
BOUND, REFERENCE = "belady", "lru"
# Room for experts: one and a half times what a token needs, then shares of all.
_ACTIVE: Final = 1.5
_SHARES: Final = (0.25, 0.5, 0.75)
_LENGTH: Final = 256
_CHARS_PER_TOKEN: Final = 8
Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True)
class Recorded:
    """What a model chose on a text, one token after the other, as it would when it writes.

    Attributes:
        texts: by sequence, the calls of all layers for each token in turn.
        num_experts: of every layer.
        top_k: experts of a token in a layer, at most.
        expert_num_bytes: of an expert as it is stored.
        num_tokens: of all sequences.
    """

    texts: tuple[tuple[Call, ...], ...]
    num_experts: tuple[int, ...]
    top_k: int
    expert_num_bytes: int
    num_tokens: int

    @property
    def counts(self) -> dict[int, list[float]]:
        """By layer, how often each expert was chosen."""
        seen = Counter(Key(c.layer, e) for text in self.texts for c in text for e in c.experts)
        return {n: [float(seen[Key(n, e)]) for e in range(num)] for n, num in enumerate(self.num_experts)}

    def sizes(self) -> tuple[int, ...]:
        """Numbers of experts that caches have room for, ascending."""
        total = sum(self.num_experts)
        active = int(_ACTIVE * self.top_k * len(self.num_experts))
        return tuple(sorted({min(total, active), *(max(1, int(share * total)) for share in _SHARES)}))


@final
@dataclass(slots=True)
class Standing:
    """One cache at one size, over all texts.

    Attributes:
        name: of the cache.
        num_slots: experts that it has room for.
        share: of all experts.
        hit_rates: of each text.
        missed_bytes: read for each token, of each text.
        over_bound: misses over those of `BOUND`, of each text.
    """

    name: str
    num_slots: int
    share: float
    hit_rates: list[float] = field(default_factory=list)
    missed_bytes: list[float] = field(default_factory=list)
    over_bound: list[float] = field(default_factory=list)


def record(path: Path, num_tokens: int, seed: int) -> Recorded:
    """Run a model over held-out text and note the choices of every token in every layer."""
    view = open_checkpoint(path)
    tokenizer, vocabulary = load_tokenizer(path), num_embeddings_of(view.config)
    documents = held_out(_CHARS_PER_TOKEN * num_tokens, seed)
    batch = encode_documents(documents, tokenizer, _LENGTH, num_tokens, vocabulary)
    model = load(path)
    layers = open_model(model).layers
    watches = []
    for layer in layers:
        module: Any = layer.experts
        module.mixtura_observer = watch = _Watch(layer.router_weight())
        watches.append(watch)
    texts = []
    with torch.no_grad():
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            model(input_ids=ids[mask.bool()][None])
            seen = [watch.take() for watch in watches]
            texts.append(tuple(_calls(seen)))
    return Recorded(
        tuple(texts),
        tuple(layer.num_experts for layer in layers),
        max(layer.top_k for layer in layers),
        view.layers[0].expert_num_bytes,
        batch.num_tokens,
    )


@final
class _Watch:
    """An observer of one layer that keeps each token's choices and what the router gives every expert."""

    def __init__(self, weight: Float[Tensor, "E D"]) -> None:
        self._weight = weight.float()
        self._seen: list[tuple[Tensor, Tensor]] = []

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """Note the choices."""
        self._seen.append((top_k_index.clone(), (hidden.float() @ self._weight.T).softmax(-1)))

    def expert(self, expert: int, token_ids: Any, weights: Any, inputs: Any, outputs: Any) -> None:
        """What experts make of tokens is not asked."""

    def finish(self) -> None:
        """Nothing more."""

    def take(self) -> tuple[Tensor, Tensor]:
        """Choices and shares of all tokens since the last time."""
        chosen, shares = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        return chosen, shares


def _calls(seen: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Call]:
    for token in range(seen[0][0].shape[0]):
        for number, (chosen, shares) in enumerate(seen):
            num = shares.shape[1]
            experts = tuple(sorted({e for e in chosen[token].tolist() if 0 <= e < num}))
            yield Call(number, experts, (1,) * len(experts), tuple(shares[token].tolist()))


def replay_calls(cache: Cache, recorded: Recorded) -> tuple[int, int]:
    """How many experts were needed, and how many of them a cache had.

    Experts of one call are held together, as when they run; all but the bound, which is one without that.
    """
    is_bound = "oracle" in header("caches", _name(cache)).tags
    if is_bound:
        cache.foresee([Key(c.layer, e) for text in recorded.texts for c in text for e in c.experts])
    needed = hits = 0
    for text in recorded.texts:
        cache.begin()
        for call in text:
            cache.see(call)
            held = frozenset(Key(call.layer, expert) for expert in call.experts)
            for expert in call.experts:
                hits += cache.touch(call.layer, expert, () if is_bound else held).hit
            needed += len(call.experts)
    return needed, hits


def hold(path: Path, names: Sequence[str], num_texts: int, num_tokens: int, say: Say) -> list[Standing]:
    """Record texts and replay them through caches of several sizes.

    Args:
        path: a checkpoint directory.
        names: caches; `BOUND` and `REFERENCE` always take part, and none means all.
        num_texts: texts of their own, each with another seed; one more is what ``reads:trace`` learns from.
        num_tokens: of each.
        say: told what is done.

    Raises:
        UnknownNameError: there is no such cache.
    """
    known = own_names("caches")
    for name in names:
        if name not in known:
            raise UnknownNameError("cache", name, known)
    chosen = [name for name in known if not names or name in (*names, BOUND, REFERENCE)]
    say(f"recording a text of {num_tokens} tokens for caches that learn")
    lesson = record(path, num_tokens, num_texts).counts
    table: dict[tuple[str, int], Standing] = {}
    for seed in range(num_texts):
        say(f"recording text {seed + 1} of {num_texts}")
        recorded = record(path, num_tokens, seed)
        for size in recorded.sizes():
            say(f"replaying it with room for {size} of {sum(recorded.num_experts)} experts")
            _replay_all(table, chosen, size, recorded, lesson)
    return sorted(table.values(), key=lambda one: (one.num_slots, _mean(one.missed_bytes), one.name))


def _replay_all(
    table: dict[tuple[str, int], Standing],
    names: Sequence[str],
    size: int,
    recorded: Recorded,
    lesson: dict[int, list[float]],
) -> None:
    least = 0
    for name in sorted(names, key=lambda one: one != BOUND):
        cache: Cache = create("caches", name, size)
        cache.learn(lesson)
        needed, hits = replay_calls(cache, recorded)
        misses = needed - hits
        least = misses if name == BOUND else least
        one = table.setdefault((name, size), Standing(name, size, size / sum(recorded.num_experts)))
        one.hit_rates.append(hits / needed)
        one.missed_bytes.append(misses * recorded.expert_num_bytes / recorded.num_tokens)
        one.over_bound.append(misses / max(least, 1))


def _name(cache: Cache) -> str:
    return type(cache).__module__.rpartition(".")[2]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
