"""What a model chose on text, token by token, to learn what a cache or a prefetcher makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.checkpoints.view import open_model
from mixtura.data.text import held_out
from mixtura.data.tokens import TokenBatch, encode_documents, num_embeddings_of
from mixtura.methods.caches import Call, Key
from mixtura.running.loading import load
from mixtura.running.tiers.opening import Wish

# Room for experts: one and a half times what a token needs, then shares of all.
_ACTIVE: Final = 1.5
_SHARES: Final = (0.25, 0.5, 0.75)
_LENGTH: Final = 256
_CHARS_PER_TOKEN: Final = 8


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
        outlooks: by sequence, then by a layer and a later one, what the later one's router makes of the
            first one's tokens, a row each; empty where that was not asked for.
        tokens: by sequence and layer, what the router was given, a row a token; empty as these.
    """

    texts: tuple[tuple[Call, ...], ...]
    num_experts: tuple[int, ...]
    top_k: int
    expert_num_bytes: int
    num_tokens: int
    outlooks: tuple[Mapping[tuple[int, int], Float[Tensor, "T E"]], ...] = ()
    tokens: tuple[tuple[Float[Tensor, "T D"], ...], ...] = ()

    @property
    def counts(self) -> dict[int, list[float]]:
        """By layer, how often each expert was chosen."""
        seen = Counter(Key(c.layer, e) for text in self.texts for c in text for e in c.experts)
        return {n: [float(seen[Key(n, e)]) for e in range(num)] for n, num in enumerate(self.num_experts)}

    @property
    def pairs(self) -> dict[int, list[list[float]]]:
        """By layer, how often each of its experts was followed by each of the next one's, of a token."""
        made = {
            layer: [[0.0] * later for _ in range(num)]
            for layer, (num, later) in enumerate(pairwise(self.num_experts))
        }
        for first, second in (pair for text in self.texts for pair in pairwise(text)):
            if second.layer == first.layer + 1:
                for expert in first.experts:
                    for other in second.experts:
                        made[first.layer][expert][other] += 1
        return made

    def sizes(self) -> tuple[int, ...]:
        """Numbers of experts that caches have room for, ascending."""
        total = sum(self.num_experts)
        active = int(_ACTIVE * self.top_k * len(self.num_experts))
        return tuple(sorted({min(total, active), *(max(1, int(share * total)) for share in _SHARES)}))


def text_of(path: Path, num_tokens: int, seed: int) -> TokenBatch:
    """Held-out text for a model, of about so many tokens."""
    tokenizer, vocabulary = load_tokenizer(path), num_embeddings_of(open_checkpoint(path).config)
    documents = held_out(_CHARS_PER_TOKEN * num_tokens, seed)
    return encode_documents(documents, tokenizer, _LENGTH, num_tokens, vocabulary)


def record(
    path: Path, num_tokens: int, seed: int, *, outlook: int = 0, memory: int | str | None = None
) -> Recorded:
    """Run a model over held-out text and note the choices of every token in every layer.

    Args:
        path: a checkpoint directory.
        num_tokens: of the text.
        seed: which text.
        outlook: layers ahead for which each layer's tokens are given to the later one's router.
        memory: what the process may take, where the model is larger than memory; see `mixtura.load`.
    """
    view, batch = open_checkpoint(path), text_of(path, num_tokens, seed)
    model = load(path) if memory is None else load(path, memory=Wish(memory=memory, context=_LENGTH))
    layers = open_model(model).layers
    weights = [layer.router_weight() for layer in layers]
    watches = []
    for number, layer in enumerate(layers):
        later = range(number + 1, min(number + outlook + 1, len(layers)))
        module: Any = layer.experts
        module.mixtura_observer = watch = _Watch(weights[number], {n: weights[n] for n in later})
        watches.append(watch)
    texts, outlooks, tokens = [], [], []
    with torch.no_grad():
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            model(input_ids=ids[mask.bool()][None])
            outlooks.append({(n, later): s for n, w in enumerate(watches) for later, s in w.ahead().items()})
            tokens.append(tuple(watch.tokens() for watch in watches))
            seen = [watch.take() for watch in watches]
            texts.append(tuple(_calls(seen)))
    return Recorded(
        tuple(texts),
        tuple(layer.num_experts for layer in layers),
        max(layer.top_k for layer in layers),
        view.layers[0].expert_num_bytes,
        batch.num_tokens,
        tuple(outlooks),
        tuple(tokens) if outlook else (),
    )


@final
class _Watch:
    """An observer of one layer that keeps each token's choices and what the router gives every expert."""

    def __init__(self, weight: Float[Tensor, "E D"], later: Mapping[int, Float[Tensor, "E D"]]) -> None:
        self._weight = weight.float()
        self._later = {number: one.float() for number, one in later.items()}
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._ahead: dict[int, list[Tensor]] = {}
        self._tokens: list[Tensor] = []

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """Note the choices."""
        tokens = hidden.float()
        self._tokens.append(tokens.clone())
        self._seen.append((top_k_index.clone(), (tokens @ self._weight.T).softmax(-1)))
        for number, weight in self._later.items():
            if weight.shape[1] == tokens.shape[1]:
                self._ahead.setdefault(number, []).append((tokens @ weight.T).softmax(-1))

    def expert(self, expert: int, token_ids: Any, weights: Any, inputs: Any, outputs: Any) -> None:
        """What experts make of tokens is not asked."""

    def finish(self) -> None:
        """Nothing more."""

    def ahead(self) -> dict[int, Tensor]:
        """What later layers' routers make of all tokens since the last time."""
        made = {number: torch.cat(parts) for number, parts in self._ahead.items()}
        self._ahead.clear()
        return made

    def tokens(self) -> Tensor:
        """All tokens since the last time."""
        made = torch.cat(self._tokens)
        self._tokens.clear()
        return made

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
