"""What every router of prompts among whole models promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mixtura.authoring.contracts._core import Subject, require
from mixtura.errors import UserError
from mixtura.methods.model_routers import ModelRouter
from mixtura.types.models import Decision, Lessons, ModelCard, Prompt, PromptBatch, Scores, Wish

_NUM_PROMPTS, _WIDTH = 40, 6
_NAMES = ("ant", "bee", "cat", "dog")
_MANY = 4000


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int, num_prompts: int = _NUM_PROMPTS) -> Lessons:
    """Prompts of three tasks, four models each good at other tasks, and some outcomes missing."""
    del method
    generator = np.random.default_rng(seed)
    tasks = generator.integers(3, size=num_prompts)
    tasks[:3] = range(3)
    points = np.eye(3, _WIDTH)[tasks] + 0.2 * generator.normal(size=(num_prompts, _WIDTH))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    prompts = tuple(
        Prompt(id=f"p{n:05}", text=f"task {t}", labels={"task": f"t{t}", "skills": f"s{t}"})
        for n, t in enumerate(tasks)
    )
    chance = np.array([[0.9, 0.2, 0.3, 0.5], [0.2, 0.9, 0.4, 0.5], [0.3, 0.2, 0.9, 0.5]])[tasks]
    scores = (generator.random(chance.shape) < chance).astype(float)
    scores[generator.random(chance.shape) < 0.1] = np.nan
    costs = np.array([1e8, 4e8, 2e8, 8e8]) * generator.uniform(0.5, 1.5, (num_prompts, 1))
    cards = tuple(
        ModelCard(name=name, input_price=10 * n + 10, output_price=100, context=1000, num_bytes=10)
        for n, name in enumerate(_NAMES)
    )
    return Lessons(PromptBatch(prompts, points), cards, scores, costs)


def use(router: ModelRouter, lessons: Lessons) -> tuple[Scores, list[Decision]]:
    """What is expected and decided for the prompts that it learned from."""
    router.fit(lessons)
    expected = router.estimate(lessons.batch, lessons.cards, lessons.costs)
    return expected, router.decide(lessons.batch, lessons.cards, lessons.costs, Wish(explore=0.2))


def check_estimates_are_sound(method: Subject) -> None:
    """Qualities lie in [0, 1], errors are not negative, weights sum to one; each prompt has some quality."""
    scores, _ = use(method.create(), sample(method, 20))
    quality = scores.quality
    require(not np.isnan(quality).all(1).any(), "nothing is expected of any model for a prompt")
    require(
        (np.nan_to_num(quality) >= 0).all() and (np.nan_to_num(quality) <= 1).all(), "quality is no share"
    )
    require((np.nan_to_num(scores.error) >= 0).all(), "a standard error is negative")
    require((scores.weights is not None) == method.has("soft"), "weights and the tag `soft` go together")
    if scores.weights is not None:
        require(np.allclose(scores.weights.sum(1), 1), "weights do not sum to one")
        require((scores.weights >= 0).all(), "a weight is negative")


def check_order_and_names_do_not_matter(method: Subject) -> None:
    """Cards and rows in another order, and models by other names in the same order, change nothing."""
    lessons = sample(method, 21)
    plain = _fitted(method, lessons).estimate(lessons.batch, lessons.cards, lessons.costs)
    turned = _fitted(method, _reordered(lessons))
    columns = [2, 0, 3, 1]
    cards = tuple(lessons.cards[n] for n in columns)
    again = turned.estimate(lessons.batch, cards, lessons.costs[:, columns])
    require(_same(again.quality, plain.quality[:, columns]), "another order of cards gives other scores")
    renamed = replace(lessons, cards=tuple(replace(c, name="x" + c.name) for c in lessons.cards))
    other = _fitted(method, renamed).estimate(lessons.batch, renamed.cards, lessons.costs)
    require(_same(other.quality, plain.quality), "other names of models give other scores")


def check_prompts_are_independent(method: Subject) -> None:
    """A prompt scored alone scores as among others."""
    lessons = sample(method, 22)
    router = _fitted(method, lessons)
    whole = router.estimate(lessons.batch, lessons.cards, lessons.costs)
    for row in (0, 7):
        one = PromptBatch(lessons.batch.prompts[row : row + 1], lessons.batch.embeddings[row : row + 1])
        alone = router.estimate(one, lessons.cards, lessons.costs[row : row + 1])
        require(_same(alone.quality, whole.quality[row : row + 1]), "a prompt alone scores otherwise")


def check_the_ineligible_are_not_chosen(method: Subject) -> None:
    """A model that lacks an ability, lacks context or may cost too much is left out, and why is said."""
    lessons = sample(method, 23)
    router = _fitted(method, lessons)
    prompt = replace(lessons.batch.prompts[0], needs=frozenset({"tools"}), num_tokens=50, max_tokens=10)
    batch = PromptBatch((prompt,), lessons.batch.embeddings[:1])
    able = {"abilities": frozenset({"tools"})}
    changes: tuple[dict[str, Any], ...] = ({}, {**able, "context": 50}, {**able, "output_price": 10**9}, able)
    cards = tuple(replace(card, **change) for card, change in zip(lessons.cards, changes, strict=True))
    for seed in range(5):
        wish = Wish(explore=1.0, budget=1e6)
        (one,) = router.decide(batch, cards, lessons.costs[:1], wish, seed)
        require(one.models == ("dog",), f"{one.models} may be asked, where only dog is eligible")
        require(set(one.ineligible) == {"ant", "bee", "cat"}, "the others need a reason each")
    (none,) = router.decide(batch, cards[:1], lessons.costs[:1, :1])
    require(none.models == (), "a model that cannot answer is chosen where there is no other")


def check_propensities_are_those_drawn(method: Subject) -> None:
    """Propensities sum to one, and over many prompts models are drawn as often as they say."""
    lessons = sample(method, 24)
    router = _fitted(method, lessons)
    batch = PromptBatch(
        tuple(replace(lessons.batch.prompts[0], id=f"d{n}") for n in range(_MANY)),
        np.repeat(lessons.batch.embeddings[:1], _MANY, axis=0),
    )
    if method.has("oracle"):
        batch = PromptBatch(lessons.batch.prompts[:1] * _MANY, batch.embeddings)
        made = [
            router.decide(PromptBatch(batch.prompts[:1], batch.embeddings[:1]), lessons.cards,
                          lessons.costs[:1], Wish(explore=0.4), seed)[0]
            for seed in range(500)
        ]  # fmt: skip
    else:
        costs = np.repeat(lessons.costs[:1], _MANY, axis=0)
        made = router.decide(batch, lessons.cards, costs, Wish(explore=0.4), seed=3)
    for name in _NAMES:
        share = np.mean([one.model == name for one in made])
        meant = np.mean([one.propensities[name] for one in made])
        require(abs(share - meant) < 0.07, f"{name} is drawn {share:.1%} of the time, not {meant:.1%}")
    require(all(abs(sum(d.propensities.values()) - 1) < 1e-9 for d in made), "propensities do not sum to 1")


def check_same_seed_same_decision(method: Subject) -> None:
    """A seed settles what is drawn, whatever the order of cards."""
    lessons = sample(method, 25)
    router = _fitted(method, lessons)
    columns = [3, 1, 0, 2]
    wish = Wish(explore=0.5)
    plain = router.decide(lessons.batch, lessons.cards, lessons.costs, wish, seed=5)
    cards = tuple(lessons.cards[n] for n in columns)
    turned = router.decide(lessons.batch, cards, lessons.costs[:, columns], wish, seed=5)
    require([d.model for d in plain] == [d.model for d in turned], "the order of cards changes what is drawn")
    other = router.decide(lessons.batch, lessons.cards, lessons.costs, wish, seed=6)
    require([d.model for d in plain] != [d.model for d in other], "another seed draws nothing else")


def check_a_dearer_dollar_costs_no_more(method: Subject) -> None:
    """The more a dollar must buy, the less is expected to be spent, on every prompt."""
    lessons = sample(method, 26)
    router = _fitted(method, lessons)
    before = None
    for per_dollar in (0.0, 100.0, 1000.0, 1e5):
        made = router.decide(lessons.batch, lessons.cards, lessons.costs, Wish(quality_per_dollar=per_dollar))
        spent = np.array([sum(p * d.cost[n] for n, p in d.propensities.items()) for d in made])
        require(before is None or (spent <= before + 1e-6).all(), "a greater price of money costs more")
        before = spent


def check_limits_are_kept(method: Subject) -> None:
    """With a limit on cost a model below it is chosen where there is one."""
    if method.has("soft"):
        return
    lessons = sample(method, 27)
    limit = 3e8
    made = _fitted(method, lessons).decide(lessons.batch, lessons.cards, lessons.costs, Wish(most_cost=limit))
    for one in made:
        below = [name for name in one.quality if one.cost[name] <= limit]
        require(not below or one.cost[str(one.model)] <= limit, f"{one.model} is chosen beyond the limit")


def check_few_and_equal_outcomes(method: Subject) -> None:
    """One model, one score throughout, and one prompt still give decisions, or are refused in a sentence."""
    lessons = sample(method, 28)
    tables = [
        replace(lessons, scores=np.zeros_like(lessons.scores)),
        replace(lessons, scores=np.ones_like(lessons.scores)),
        replace(lessons, cards=lessons.cards[:1], scores=np.ones((_NUM_PROMPTS, 1)),
                costs=lessons.costs[:, :1]),
        Lessons(PromptBatch(lessons.batch.prompts[:1], lessons.batch.embeddings[:1]), lessons.cards,
                np.ones((1, 4)), lessons.costs[:1]),
    ]  # fmt: skip
    for table in tables:
        router = method.create()
        try:
            router.fit(table)
        except UserError:
            continue
        made = router.decide(table.batch, table.cards, table.costs)
        require(all(one.model for one in made), "no model is chosen")


def check_nothing_learned_is_refused(method: Subject) -> None:
    """Before it has learned, and from a table without scores, a router refuses in a sentence."""
    lessons = sample(method, 29)
    empty = replace(lessons, scores=np.full_like(lessons.scores, np.nan))
    for table, expected in ((lessons, "decides"), (empty, "learns")):
        router: ModelRouter = method.create()
        try:
            if expected == "decides":
                router.decide(table.batch, table.cards, table.costs)
            else:
                router.fit(table)
        except UserError:
            continue
        require(False, f"it {expected} without a score")


def check_what_is_kept_is_enough(method: Subject) -> None:
    """A router made again from its models and its state decides the same, exactly."""
    lessons = sample(method, 30)
    router = _fitted(method, lessons)
    again: ModelRouter = method.create()
    again.restore(router.models, {key: np.array(value) for key, value in router.state.items()})
    one, two = (r.estimate(lessons.batch, lessons.cards, lessons.costs) for r in (router, again))
    require(_same(one.quality, two.quality, exact=True), "a restored router scores otherwise")
    require(_same(one.error, two.error, exact=True), "a restored router is sure of something else")


def check_a_model_that_comes_later(method: Subject) -> None:
    """Under `dynamic_pool` a new model leaves old scores alone and gets its own; else it is refused."""
    lessons = sample(method, 31)
    old, new = _columns(lessons, [0, 1, 3]), _columns(lessons, [2])
    router = _fitted(method, old)
    before = router.score(lessons.batch).quality
    if not method.has("dynamic_pool"):
        try:
            router.admit(new)
        except UserError:
            return
        require(False, "a model is admitted without the tag `dynamic_pool`")
    router.admit(new)
    require(router.models == ("ant", "bee", "dog", "cat"), f"the models are {router.models}")
    after = router.score(lessons.batch).quality
    require(_same(after[:, :3], before, exact=True), "a new model changes old scores")
    require(not np.isnan(after[:, 3]).any(), "nothing is expected of the new model")


def check_a_model_that_left(method: Subject) -> None:
    """Without one of the cards the others score as before."""
    lessons = sample(method, 32)
    router = _fitted(method, lessons)
    whole = router.estimate(lessons.batch, lessons.cards, lessons.costs).quality
    fewer = router.estimate(lessons.batch, lessons.cards[1:], lessons.costs[:, 1:]).quality
    require(_same(fewer, whole[:, 1:], exact=True), "scores change when another model is not offered")


def _fitted(method: Subject, lessons: Lessons) -> ModelRouter:
    router: ModelRouter = method.create()
    router.fit(lessons)
    return router


def _columns(lessons: Lessons, columns: list[int]) -> Lessons:
    cards = tuple(lessons.cards[n] for n in columns)
    return Lessons(lessons.batch, cards, lessons.scores[:, columns], lessons.costs[:, columns])


def _reordered(lessons: Lessons) -> Lessons:
    rows = np.arange(len(lessons.batch))[::-1]
    turned = _columns(lessons, [3, 1, 0, 2])
    batch = PromptBatch(tuple(lessons.batch.prompts[n] for n in rows), lessons.batch.embeddings[rows])
    return Lessons(batch, turned.cards, turned.scores[rows], turned.costs[rows])


def _same(one: np.ndarray, two: np.ndarray, *, exact: bool = False) -> bool:
    if exact:
        return bool(np.array_equal(one, two, equal_nan=True))
    return bool(np.allclose(one, two, rtol=0, atol=1e-9, equal_nan=True))
