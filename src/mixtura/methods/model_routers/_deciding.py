"""From what is expected of models to a choice: who is eligible, what is preferred, what is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int

from mixtura.errors import UserError, check_range
from mixtura.types.models import PICO_PER_DOLLAR, Decision, ModelCard, Prompt, Scores, Wish

# An answer whose length neither prompt nor card limits is taken to have at most so many tokens.
MOST_TOKENS: Final = 4096


def decisions(
    prompts: Sequence[Prompt], cards: Sequence[ModelCard], scores: Scores, wish: Wish, seed: int
) -> list[Decision]:
    """A decision for each prompt."""
    check_wish(wish, cards, scores)
    reasons = [[ineligible(prompt, card, wish.budget) for card in cards] for prompt in prompts]
    eligible = np.array([[not reason for reason in row] for row in reasons]).reshape(len(prompts), len(cards))
    order = ranking(scores, wish, eligible, cards)
    return [
        _decision(prompts[row], cards, scores, wish, reasons[row], order[row], row, seed)
        for row in range(len(prompts))
    ]


def check_wish(wish: Wish, cards: Sequence[ModelCard], scores: Scores) -> None:
    """Refuse what cannot be heeded.

    Raises:
        UserError: no model, no costs to count by, a fallback that is no model, or a number out of range.
    """
    if not cards:
        raise UserError("there is no model to choose from; give the card of one or more")
    check_range("Wish", "explore", wish.explore, 0, 1)
    check_range("Wish", "quality_per_dollar", wish.quality_per_dollar, 0, float("inf"))
    about_money = [
        name
        for name, asked in (
            ("quality_per_dollar", wish.quality_per_dollar > 0),
            ("most_cost", wish.most_cost is not None),
            ("least_quality", wish.least_quality is not None),
        )
        if asked
    ]
    if about_money and len(scores.cost) and np.isnan(scores.cost).all():
        raise UserError(
            f"{about_money[0]} needs to know what models cost, and no outcome has a cost and no card both "
            "prices; give input_price and output_price on the cards"
        )
    if len(about_money) > 1:
        raise UserError(f"give one of {' and '.join(about_money)}, not both")
    if wish.fallback and wish.fallback not in {card.name for card in cards}:
        raise UserError(f"the fallback {wish.fallback!r} is none of the models; give the name of one")


def ineligible(prompt: Prompt, card: ModelCard, budget: float | None) -> str:
    """Why a model cannot be asked a prompt; empty where it can."""
    missing = sorted(prompt.needs - card.abilities)
    if missing:
        return f"lacks {' and '.join(missing)}"
    if card.context is not None and prompt.input_tokens >= card.context:
        return f"{prompt.input_tokens} tokens, where its context has {card.context}"
    if budget is None:
        return ""
    dearest = dearest_answer(prompt, card)
    if dearest is None:
        return "its prices are not known, and there is a budget"
    if dearest <= budget:
        return ""
    limit, most = (amount / PICO_PER_DOLLAR for amount in (budget, dearest))
    return f"an answer may cost ${most:.3g}, more than the budget of ${limit:.3g}"


def dearest_answer(prompt: Prompt, card: ModelCard) -> float | None:
    """Pico-dollars that an answer costs at most; None where prices are not known."""
    limits = [one for one in (prompt.max_tokens, card.max_output) if one is not None]
    if card.context is not None:
        limits.append(max(0, card.context - prompt.input_tokens))
    return card.cost(prompt.input_tokens, min(limits, default=MOST_TOKENS))


def ranking(
    scores: Scores, wish: Wish, eligible: Bool[np.ndarray, "P M"], cards: Sequence[ModelCard]
) -> Int[np.ndarray, "P M"]:
    """Models of each prompt from the most preferred to the least; those not eligible come last.

    Of two that are preferred alike the cheaper comes first, then the one whose name does. A model of which
    nothing is known comes after all of which something is.
    """
    quality = np.where(np.isnan(scores.quality), -np.inf, scores.quality)
    # A price that nobody knows may be any: it is taken for the dearest there is.
    dearest = np.nanmax(scores.cost, initial=0.0)
    cost = np.where(np.isnan(scores.cost), dearest, scores.cost)
    names = np.argsort(np.argsort([card.name for card in cards]))
    worth, first = _worth(quality, cost, wish)
    keys = (np.broadcast_to(names, quality.shape), cost, -worth, -first, ~eligible)
    return np.lexsort(keys, axis=1)


def _worth(
    quality: Float[np.ndarray, "P M"], cost: Float[np.ndarray, "P M"], wish: Wish
) -> tuple[Float[np.ndarray, "P M"], Float[np.ndarray, "P M"]]:
    """What models are ranked by, and before that whether they keep a limit."""
    if wish.most_cost is not None:
        within = (cost <= wish.most_cost) & np.isfinite(quality)
        # Of those beyond the limit the cheapest is the nearest to it.
        return np.where(within, quality, -cost / (1 + cost.max(initial=0.0))), within.astype(float)
    if wish.least_quality is not None:
        reached = quality >= wish.least_quality
        return np.where(reached, -cost, quality), reached.astype(float)
    return quality - wish.quality_per_dollar * cost / PICO_PER_DOLLAR, np.zeros_like(quality)


def _decision(
    prompt: Prompt,
    cards: Sequence[ModelCard],
    scores: Scores,
    wish: Wish,
    reasons: Sequence[str],
    order: Int[np.ndarray, " M"],
    row: int,
    seed: int,
) -> Decision:
    names = [card.name for card in cards]
    able = [int(number) for number in order if not reasons[number]]
    quality = {names[n]: float(scores.quality[row, n]) for n in able if np.isfinite(scores.quality[row, n])}
    cost = {names[n]: float(scores.cost[row, n]) for n in able if np.isfinite(scores.cost[row, n])}
    refused = {name: reason for name, reason in zip(names, reasons, strict=True) if reason}
    if able and _abstains(scores, wish, row, able):
        asked = [names[n] for n in able if names[n] == wish.fallback]
        sure = dict.fromkeys(asked, 1.0)
        return Decision(
            prompt=prompt.id, models=tuple(asked), propensities=sure, quality=quality, cost=cost,
            ineligible=refused, abstained=True,
        )  # fmt: skip
    shares = _shares(scores, wish, row, able)
    drawn = _draw(shares, able, names, prompt, seed)
    models = (drawn, *(n for n in able if n != drawn)) if able else ()
    # A method that draws by shares of its own has no first choice that another one could differ from.
    explored = bool(able) and scores.weights is None and drawn != able[0]
    return Decision(
        prompt=prompt.id,
        models=tuple(names[n] for n in models),
        propensities={names[n]: share for n, share in zip(able, shares, strict=True)},
        quality=quality,
        cost=cost,
        ineligible=refused,
        explored=explored,
    )


def _abstains(scores: Scores, wish: Wish, row: int, able: Sequence[int]) -> bool:
    if wish.floor is None:
        return False
    quality, error = scores.quality[row, able], scores.error[row, able]
    surely = np.where(np.isnan(error), quality, quality - wish.confidence * error)
    return not bool((surely >= wish.floor).any())


def _shares(scores: Scores, wish: Wish, row: int, able: Sequence[int]) -> list[float]:
    """With which probability each eligible model, the most preferred first, is chosen."""
    if not able:
        return []
    base = np.zeros(len(able))
    base[0] = 1.0
    if scores.weights is not None:
        given = scores.weights[row, able]
        if given.sum() > 0:
            base = given / given.sum()
    mixed = (1 - wish.explore) * base + wish.explore / len(able)
    return [float(one) for one in mixed]


def _draw(
    shares: Sequence[float], able: Sequence[int], names: Sequence[str], prompt: Prompt, seed: int
) -> int:
    """One of the eligible, by a number that seed and prompt give, whatever the order of cards."""
    if not able:
        return -1
    if max(shares) == 1.0:
        return able[shares.index(1.0)]
    digest = hashlib.blake2b(f"{seed}\0{prompt.id}".encode("utf-8", "replace"), digest_size=8).digest()
    at = int.from_bytes(digest, "big") / 2**64
    by_name = sorted(zip([names[n] for n in able], shares, able, strict=True))
    total = 0.0
    for _, share, number in by_name:
        total += share
        if at < total:
            return number
    return max(by_name, key=lambda one: one[1])[2]
