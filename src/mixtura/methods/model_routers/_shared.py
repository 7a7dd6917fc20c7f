"""Mathematics that model routers share: means with holes, clusters, neighbours, words as arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import final

import numpy as np
from jaxtyping import Bool, Float, Int

from mixtura.errors import SettingError
from mixtura.types.models import PromptBatch


@final
class Adam:
    """Adam's moments of one array, and its steps."""

    def __init__(self, part: np.ndarray) -> None:
        self._first, self._second = np.zeros_like(part), np.zeros_like(part)

    def change(self, slope: np.ndarray, rate: float, step: int) -> np.ndarray:
        """What step number ``step``, from 1, takes from the array; ``slope`` is the loss's."""
        self._first += 0.1 * (slope - self._first)
        self._second += 0.001 * (slope**2 - self._second)
        scale = rate / (1 - 0.9**step)
        taken: np.ndarray = scale * self._first / (np.sqrt(self._second / (1 - 0.999**step)) + 1e-8)
        return taken


def check_word(owner: str, name: str, value: str) -> None:
    """Refuse a name that is to be found in a table and has spaces, as names in tables have none.

    Raises:
        SettingError: it has, or is empty.
    """
    if not value or any(letter.isspace() for letter in value):
        raise SettingError(f"{name} of {owner} must be a name without spaces, got {value!r}")


def mean_scores(scores: Float[np.ndarray, "P M"]) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Mean score of each model and its standard error; NaN for a model without any.

    A model has at least one success and one failure that nobody saw, half of each, in its error; so a
    model that was right once is not sure to be right.
    """
    seen = ~np.isnan(scores)
    count = seen.sum(0)
    total = np.where(seen, scores, 0.0).sum(0)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    smooth = (total + 0.5) / (count + 1)
    error = np.where(count > 0, np.sqrt(smooth * (1 - smooth) / np.maximum(count, 1)), np.nan)
    return mean, error


def group_means(
    scores: Float[np.ndarray, "P M"],
    groups: Int[np.ndarray, " P"],
    num_groups: int,
    prior: float,
) -> tuple[Float[np.ndarray, "G M"], Float[np.ndarray, "G M"]]:
    """Mean score of each model in each group, drawn to the model's own mean as by ``prior`` more outcomes.

    Returns:
        The means and their standard errors; NaN for a model without any outcome.
    """
    overall, _ = mean_scores(scores)
    seen = ~np.isnan(scores)
    total, count = np.zeros((2, num_groups, scores.shape[1]))
    np.add.at(total, groups, np.where(seen, scores, 0.0))
    np.add.at(count, groups, seen.astype(float))
    weight = count + prior
    drawn = np.where(weight > 0, (total + prior * overall) / np.maximum(weight, 1e-12), overall)
    return drawn, binomial_error(drawn, weight)


def binomial_error(mean: Float[np.ndarray, "*A"], count: Float[np.ndarray, "*A"]) -> Float[np.ndarray, "*A"]:
    """Standard error of a share of so many outcomes, with half a success and half a failure added."""
    smooth = (mean * count + 0.5) / (count + 1)
    out: np.ndarray = np.sqrt(smooth * (1 - smooth) / np.maximum(count, 1))
    return out


def clusters(points: Float[np.ndarray, "P C"], num: int, seed: int, rounds: int = 30) -> np.ndarray:
    """Centres of k-means on directions, by k-means++; fewer where there are fewer different points."""
    generator = np.random.default_rng(seed)
    different = np.unique(points, axis=0)
    num = min(num, len(different))
    centres = different[generator.integers(len(different))][None]
    while len(centres) < num:
        gap = np.clip(1 - (different @ centres.T).max(1), 0, None)
        if gap.sum() <= 0:
            break
        centres = np.concatenate(
            [centres, different[generator.choice(len(different), p=gap / gap.sum())][None]]
        )
    for _ in range(rounds):
        near = nearest_centre(points, centres)
        moved = np.stack(
            [points[near == k].sum(0) if (near == k).any() else centres[k] for k in range(len(centres))]
        )
        moved /= np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
        if np.allclose(moved, centres):
            break
        centres = moved
    out: np.ndarray = centres
    return out


def nearest_centre(points: Float[np.ndarray, "P C"], centres: Float[np.ndarray, "G C"]) -> np.ndarray:
    """The number of the centre most like each point."""
    out: np.ndarray = (points @ centres.T).argmax(1)
    return out


def neighbours(
    points: Float[np.ndarray, "P C"], known: Float[np.ndarray, "N C"], num: int
) -> tuple[Int[np.ndarray, "P K"], Float[np.ndarray, "P K"]]:
    """The rows of ``known`` most like each point, the most like first, and how like they are."""
    num = min(num, len(known))
    rows, likeness = [], []
    # A block at a time, so that thousands by thousands of products need not be held at once.
    for start in range(0, len(points), 1024):
        products = points[start : start + 1024] @ known.T
        found = np.argsort(-products, axis=1, kind="stable")[:, :num]
        rows.append(found)
        likeness.append(np.take_along_axis(products, found, 1))
    if not rows:
        return np.zeros((0, num), int), np.zeros((0, num))
    return np.concatenate(rows), np.concatenate(likeness)


def sigmoid(x: Float[np.ndarray, "*A"]) -> Float[np.ndarray, "*A"]:
    """The logistic function, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def softmax(x: Float[np.ndarray, "P M"]) -> Float[np.ndarray, "P M"]:
    """Shares that sum to one in each row."""
    raised = np.exp(x - x.max(1, keepdims=True))
    out: np.ndarray = raised / raised.sum(1, keepdims=True)
    return out


def with_ones(points: Float[np.ndarray, "P C"]) -> Float[np.ndarray, "P N"]:
    """The points with one more feature that is always 1."""
    return np.concatenate([points, np.ones((len(points), 1), points.dtype)], axis=1)


def words_as_bytes(words: Sequence[str]) -> np.ndarray:
    """Words as an array of bytes, to be kept beside numbers."""
    return np.frombuffer(json.dumps(list(words)).encode(), np.uint8).copy()


def bytes_as_words(array: np.ndarray) -> list[str]:
    """The words that `words_as_bytes` made an array of.

    >>> bytes_as_words(words_as_bytes(["a", "ö"]))
    ['a', 'ö']
    """
    return [str(word) for word in json.loads(array.tobytes())]


def labels_of(batch: PromptBatch, label: str) -> list[str]:
    """One label of each prompt; empty where a prompt lacks it."""
    return [prompt.labels.get(label, "") for prompt in batch.prompts]


def numbered(words: Sequence[str], known: Sequence[str]) -> Int[np.ndarray, " P"]:
    """The place of each word among those known; the place after the last for any other."""
    places = {word: number for number, word in enumerate(known)}
    return np.array([places.get(word, len(known)) for word in words], dtype=int)


def unknown(num_prompts: int, num_models: int) -> Float[np.ndarray, "P M"]:
    """NaN for every prompt and model."""
    return np.full((num_prompts, num_models), np.nan)


def filled(scores: Float[np.ndarray, "P M"]) -> tuple[Float[np.ndarray, "P M"], Bool[np.ndarray, "P M"]]:
    """The scores with 0 in their holes, and where there was one."""
    seen = ~np.isnan(scores)
    return np.where(seen, scores, 0.0), seen


def greedy_set(
    gain: Float[np.ndarray, "G M"], sizes: Sequence[int], fits: Sequence[int], budget: int
) -> tuple[int, ...]:
    """Models of a great sum of each group's best gain within a budget of sizes: added one by one, then
    swapped.

    Args:
        gain: of each model in each group, none negative.
        sizes: of the models.
        fits: models that may be chosen; each alone is within the budget.
        budget: for the sum of sizes.
    """

    def value(chosen: Sequence[int]) -> float:
        return float(gain[:, list(chosen)].max(1).sum()) if chosen else 0.0

    def allowed(chosen: Sequence[int]) -> bool:
        return sum(sizes[n] for n in chosen) <= budget

    chosen: list[int] = []
    while True:
        grown = [[*chosen, n] for n in fits if n not in chosen and allowed([*chosen, n])]
        swapped = [
            [n, *(c for c in chosen if c != out)]
            for out in chosen
            for n in fits
            if n not in chosen and allowed([n, *(c for c in chosen if c != out)])
        ]
        best = max([*grown, *swapped], key=value, default=chosen)
        if value(best) <= value(chosen):
            return tuple(sorted(chosen))
        chosen = best
