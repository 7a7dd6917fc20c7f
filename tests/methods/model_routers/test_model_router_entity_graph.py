"""Entities tell what a prompt's words alone do not; formulas by plain loops."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from model_lessons import NAN

from mixtura.methods.model_routers._naming import entities_of
from mixtura.methods.model_routers.entity_graph import EntityGraph
from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch

TEXTS = ("in Oslo at 5", "in Rome", "in Oslo", "all is well", "in Rome at 5")
SCORES = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, NAN], [0.5, 0.4], [0.1, 0.9]])


def lessons(texts: tuple[str, ...] = TEXTS, scores: np.ndarray = SCORES, width: int = 3) -> Lessons:
    draw = np.random.default_rng(0)
    prompts = tuple(Prompt(id=f"{n:03}", text=text) for n, text in enumerate(texts))
    cards = tuple(ModelCard(name=x) for x in "ab"[: scores.shape[1]])
    return Lessons(
        PromptBatch(prompts, draw.normal(size=(len(texts), width))), cards, scores, np.ones_like(scores)
    )


def test_entities_are_found_by_their_form() -> None:
    assert entities_of("Please go to New York at 10:30, to NASA with my_file") == {
        "new",
        "york",
        "10:30",
        "nasa",
        "my_file",
    }
    assert entities_of("What is it?") == frozenset()


@pytest.mark.parametrize("leaves_out", [True, False])
def test_what_entities_tell_by_a_plain_loop(leaves_out: bool) -> None:
    given, router = lessons(), EntityGraph(prior=2.0)
    router.fit(given)
    names = [sorted(entities_of(text)) for text in TEXTS]
    kept = {name for name in chain(*names) if sum(name in one for one in names) > 1}
    assert kept == {"oslo", "rome", "5"}
    mean = np.nanmean(SCORES, axis=0)
    edges = np.array(
        [
            [float(name in one) for name in sorted(kept, key=lambda x: (-sum(x in y for y in names), x))]
            for one in names
        ]
    )
    own = (
        (given.batch.embeddings, np.nan_to_num(SCORES), (~np.isnan(SCORES)).astype(float))
        if leaves_out
        else None
    )
    points, skills = router._told(given.batch.embeddings, edges, router.state, mean, own)
    for row, one in enumerate(names):
        around, skill, num = np.zeros(3), np.zeros(2), 0
        for name in kept & set(one):
            others = [n for n in range(5) if name in names[n] and not (leaves_out and n == row)]
            num += 1
            around += sum(given.batch.embeddings[n] for n in others) / len(others)
            for m in range(2):
                known = [SCORES[n, m] for n in others if not np.isnan(SCORES[n, m])]
                skill[m] += (sum(known) + 2.0 * mean[m]) / (len(known) + 2.0) - mean[m]
        np.testing.assert_allclose(
            points[row], [*given.batch.embeddings[row], *around / max(num, 1), 1.0], atol=1e-12
        )
        np.testing.assert_allclose(skills[row], skill / max(num, 1), atol=1e-12)


def test_a_planted_skill_is_found_where_words_alone_say_nothing() -> None:
    places = [f"Town{n}" for n in range(12)]
    texts = tuple(f"go to {places[n % 12]} now" for n in range(120))
    scores = np.array([[float(n % 12 < 6), float(n % 12 >= 6)] for n in range(120)])
    given = lessons(texts, scores)
    right = {}
    for most in (0, 2000):
        router = EntityGraph(most_entities=most)
        router.fit(given)
        new = PromptBatch(
            tuple(Prompt(id=f"new {n}", text=f"see {places[n]}") for n in range(12)), np.zeros((12, 3))
        )
        chosen = router.score(new).quality.argmax(1)
        right[most] = float(np.mean(chosen == (np.arange(12) >= 6)))
    assert right[2000] == 1.0
    # Without entities there is nothing to tell the prompts apart by.
    assert right[0] == 0.5


def test_without_entities_it_is_a_softmax_of_the_prompt() -> None:
    given = lessons(("a b", "c d", "e f", "g h", "i j"))
    router = EntityGraph(num_steps=30)
    router.fit(given)
    assert router.state["names"].tobytes() == b"[]"
    weights, trust = router.state["weights"], float(router.state["trust"][0])
    assert trust == 1.0
    points = np.concatenate([given.batch.embeddings, np.zeros((5, 3)), np.ones((5, 1))], 1)
    raised = np.exp(points @ weights)
    np.testing.assert_allclose(router.score(given.batch).quality, raised / raised.sum(1, keepdims=True))
