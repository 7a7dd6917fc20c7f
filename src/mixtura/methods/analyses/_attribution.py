"""A small recurrent classifier of texts by their experts, and what each expert says for its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from mixtura.methods.analyses import Table
from mixtura.methods.analyses._shared import marks
from mixtura.types.trace import Trace

_EMBEDDING, _HIDDEN, _BATCH = 16, 64, 16
_RATE = 1e-3
_SHOWN = 20


@final
class _Classifier(nn.Module):
    """Embeds every expert of every layer and reads the tokens one after the other."""

    def __init__(self, num_ids: int, num_places: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_ids, _EMBEDDING)
        self.reader = nn.LSTM(num_places * _EMBEDDING, _HIDDEN, batch_first=True)
        self.head = nn.Linear(_HIDDEN, 1)

    def forward(self, embedded: Float[Tensor, "B T P W"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        packed = pack_padded_sequence(embedded.flatten(2), lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.reader(packed)
        made: Tensor = self.head(last[-1])[:, 0]
        return made


def attributed(
    texts: Sequence[Int[Tensor, "T L K"]], labels: Sequence[int], num_ids: int, *, epochs: int, seed: int
) -> tuple[Float[Tensor, "L _"], float]:
    """Each expert's importance for the label 1, and the accuracy on every fourth text, which is held out.

    Args:
        texts: the experts of each text's tokens by layer; ids below ``num_ids``.
        labels: 0 or 1 for each.
        num_ids: experts of the largest layer and one for absent choices.
        epochs: passes over the texts.
        seed: of the classifier's first weights and the order of the texts.
    """
    _, num_layers, top_k = texts[0].shape
    held = set(range(3, len(texts), 4))
    known = [place for place in range(len(texts)) if place not in held]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = _Classifier(num_ids, num_layers * top_k)
        optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
        for _ in range(epochs):
            order = [known[i] for i in torch.randperm(len(known), generator=generator).tolist()]
            for start in range(0, len(order), _BATCH):
                part = order[start : start + _BATCH]
                logits, _ = _run(model, [texts[i] for i in part])
                wanted = torch.tensor([float(labels[i]) for i in part])
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(logits, wanted).backward()
                optimizer.step()
        return _importance(model, texts, num_ids), _accuracy(model, texts, labels, sorted(held))


def _run(model: _Classifier, texts: Sequence[Tensor]) -> tuple[Float[Tensor, " B"], Float[Tensor, "B T P W"]]:
    lengths = torch.tensor([len(one) for one in texts])
    embedded = model.embedding(pad_sequence([one.flatten(1) for one in texts], batch_first=True))
    embedded.retain_grad()
    return model(embedded, lengths), embedded


def _importance(model: _Classifier, texts: Sequence[Tensor], num_ids: int) -> Float[Tensor, "L _"]:
    """The sum of gradient times input over all of an expert's places in the texts."""
    num_layers = texts[0].shape[1]
    sums = torch.zeros(num_layers, num_ids, dtype=torch.float64)
    for one in texts:
        logits, embedded = _run(model, [one])
        logits.sum().backward()
        assert embedded.grad is not None
        said = (embedded.grad * embedded).detach().sum(-1)[0].double().view(one.shape)
        for layer in range(num_layers):
            sums[layer].index_add_(0, one[:, layer].flatten(), said[:, layer].flatten())
    return sums


@torch.no_grad()
def _accuracy(
    model: _Classifier, texts: Sequence[Tensor], labels: Sequence[int], held: Sequence[int]
) -> float:
    right = 0
    for place in held:
        one = texts[place]
        embedded = model.embedding(one.flatten(1))[None]
        right += int((model(embedded, torch.tensor([len(one)])) > 0) == bool(labels[place]))
    return right / max(1, len(held))


def best_of(trace: Trace, shares: list[list[float]]) -> list[tuple[int, int, float]]:
    """Layer, expert and share of credit of the experts with the most."""
    found = [
        (layer.index, expert, shares[number][expert])
        for number, layer in enumerate(trace.layers)
        for expert in range(layer.shape.num_experts)
    ]
    return sorted(found, key=lambda one: (-one[2], one[:2]))[:_SHOWN]


def table_of(trace: Trace, pair: tuple[int, int], best: list[tuple[int, int, float]]) -> Table:
    """These experts, and what share of each set's tokens choose them."""
    rows: list[tuple[float, ...]] = []
    for index, expert, share in best:
        layer = trace.layer(index)
        uses: list[float] = []
        for domain in pair:
            parts = [
                marks(one, layer.shape.num_experts)[:, expert]
                for one, of in zip(trace.sequences(index), trace.sequence_domains, strict=True)
                if of == domain
            ]
            uses.append(float(torch.cat(parts).double().mean()))
        rows.append((index, expert, share, *uses))
    domains = [f"tokens of {trace.domains[place]}" for place in pair]
    return Table(
        title="Experts with the most credit, and the share of each set's tokens that choose them",
        columns=("layer", "expert", "share of credit", *domains),
        rows=tuple(rows),
    )
