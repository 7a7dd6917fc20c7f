"""What decoders share: answers in texts, votes, choices by score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods.decoders import Branch, Candidate, LayerFacts, ModelFacts, Prompt

# The temperature of branches that would be all alike at 0.
DRAWN_AT = 0.8


def several(prompt: Prompt, n: int) -> tuple[Branch, ...]:
    """So many plain branches; they are drawn at 0.8 where the user asked for no temperature."""
    temperature = prompt.temperature or (DRAWN_AT if n > 1 else 0.0)
    return (Branch(temperature=temperature),) * n


def answer_of(text: str) -> str:
    """What a text answers: its last line that has words, after a colon if it has one, in lower case.

    >>> answer_of("3 + 4 = 7\\nAnswer: 7.\\n")
    '7'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    head, colon, tail = last.rpartition(":")
    return (tail if colon and tail.strip() else head or last).strip(" .:*`\"'").lower()


def most_voted(answers: Sequence[str], weights: Sequence[float] | None = None) -> int:
    """The first text that gives the answer with most votes; among equals, the answer that came first.

    >>> most_voted(["a", "b", "b"]), most_voted(["a", "b", "b"], [3.0, 1.0, 1.0])
    (1, 0)
    """
    votes: Counter[str] = Counter()
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        votes[answer] += weight  # type: ignore[assignment]
    best = max(votes.values())
    return next(place for place, answer in enumerate(answers) if votes[answer] == best)


def best_place(scores: Sequence[float]) -> int:
    """The place of the highest score, the first of equals.

    >>> best_place([0.1, 0.9, 0.9])
    1
    """
    return max(range(len(scores)), key=lambda place: (scores[place], -place))


def mean(values: Sequence[float]) -> float:
    """The mean; minus infinity of nothing, so that it is chosen last."""
    return sum(values) / len(values) if values else float("-inf")


def score_of(candidate: Candidate) -> float:
    """The verifier's last word, else the mean log-probability of the tokens."""
    if candidate.verdicts:
        return candidate.verdicts[-1]
    return mean(candidate.log_probabilities)


def ends_line(candidate: Candidate, mark: str) -> bool:
    """Whether the last token has the mark that ends steps; a blank answer's first mark does not count."""
    *before, last = candidate.token_ids
    return mark in candidate.prompt.decode([last]) and bool(candidate.prompt.decode(before).strip())


def largest_that_leaves(scores: Float[Tensor, " N"], part: float) -> float:
    """The largest threshold below which at most a part of the scores lie.

    >>> import torch
    >>> largest_that_leaves(torch.tensor([0.5, 0.125, 0.25, 0.375]), 0.5)
    0.375
    """
    place = min(int(part * len(scores)), len(scores) - 1)
    return float(scores.sort().values[place])


def answer_divergence(answer_from: int, original: Tensor, changed: Tensor) -> float:
    """The mean Kullback-Leibler divergence of an answer's distributions from the original's, in nats."""
    first, second = (logits[answer_from - 1 : -1].log_softmax(-1) for logits in (original, changed))
    return float((first.exp() * (first - second)).sum(-1).mean())


def widths(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to the total, in falling order of the shares, each rounded up of what is left.

    >>> widths([0.5, 0.25, 0.25], 8), widths([0.98, 0.01, 0.01], 4)
    ([4, 2, 2], [4, 0, 0])
    """
    order = sorted(range(len(shares)), key=lambda place: (-shares[place], place))
    found, left, rest = [0] * len(shares), total, sum(shares)
    for place in order:
        if left <= 0 or rest <= 0:
            break
        # Rounding errors of the shares must not round a whole number up.
        found[place] = min(left, ceil(left * shares[place] / rest - 1e-9))
        left, rest = left - found[place], rest - shares[place]
    return found


def continued(candidates: Sequence[Candidate], number: int, total: int) -> list[int]:
    """The best by the verifier's last word; those of them that grow are there as often as makes a total."""
    order = sorted(range(len(candidates)), key=lambda place: (-candidates[place].verdicts[-1], place))
    kept = order[:number]
    growing = [place for place in kept if not candidates[place].finished]
    counts = widths([1.0] * len(growing), total - (len(kept) - len(growing)))
    again = [place for place, count in zip(growing, counts, strict=True) for _ in range(count)]
    return [place for place in kept if candidates[place].finished] + again


def ngram_f(first: str, second: str, longest: int = 6) -> float:
    """How much two texts share: the mean over lengths 1 to 6 of the F-score of their character n-grams.

    >>> ngram_f("abc", "abc"), ngram_f("abc", "xyz")
    (1.0, 0.0)
    """
    scores = []
    for length in range(1, longest + 1):
        one, other = (Counter(t[i : i + length] for i in range(len(t) - length + 1)) for t in (first, second))
        total = sum(one.values()) + sum(other.values())
        if total:
            scores.append(2 * sum((one & other).values()) / total)
    return sum(scores) / len(scores) if scores else float(first == second)


def pairs_by_layer(
    owner: str, pairs: Sequence[Sequence[int]], facts: ModelFacts
) -> dict[LayerFacts, tuple[int, ...]]:
    """Experts by layer, of pairs of a decoder layer and an expert.

    Raises:
        UserError: one is no pair, or its layer or expert is not there.
    """
    layers = {layer.index: layer for layer in facts.layers}
    found: dict[LayerFacts, list[int]] = {}
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(f"experts of {owner} must be pairs of a layer and an expert, got {list(pair)}")
        index, expert = pair
        if index not in layers:
            known = ", ".join(map(str, layers))
            raise UserError(f"experts of {owner} name layer {index}; the layers with experts are {known}")
        if not 0 <= expert < layers[index].num_experts:
            raise UserError(
                f"experts of {owner} name expert {expert} of layer {index}, which has "
                f"{layers[index].num_experts}; give one from 0 to {layers[index].num_experts - 1}"
            )
        found.setdefault(layers[index], []).append(expert)
    return {layer: tuple(dict.fromkeys(experts)) for layer, experts in found.items()}
