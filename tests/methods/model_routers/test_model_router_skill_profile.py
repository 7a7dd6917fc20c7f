"""What the model router skill_profile promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
from model_lessons import lessons

from mixtura.methods.model_routers.skill_profile import SkillProfile

SKILLS = [{"skills": "algebra, proof"}, {"skills": "algebra"}, {"skills": "poetry"}, {"skills": "poetry"}]
SCORES = [[1, 0, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0]]


def test_profiles_count_right_less_wrong_and_weights_follow_the_published_rule() -> None:
    given = lessons(np.eye(4).tolist(), SCORES, labels=SKILLS)
    router = SkillProfile()
    router.fit(given)
    # By skill (algebra, poetry, proof) and model.
    assert router.state["profile"].tolist() == [[2, -2, 0], [-2, 2, 0], [1, -1, 1]]
    # Sums 1, -1 and 1, shifted to 3, 1 and 3, squared; algebra and proof: 3, -3 and 1.
    strength = np.array([9, 1, 9]) / 19
    fit = np.array([3, 0, 1]) * strength
    assert np.allclose(router.score(given.batch).weights[0], fit / fit.sum())


def test_a_prompt_without_skills_has_those_of_its_neighbour() -> None:
    given = lessons(np.eye(4).tolist(), SCORES, labels=SKILLS)
    router = SkillProfile()
    router.fit(given)
    other = lessons([[0, 0, 1, 0.1]], [[0, 0, 0]])
    assert np.allclose(router.score(other.batch).weights[0], router.score(given.batch).weights[2])


def test_where_nobody_was_right_all_have_a_chance() -> None:
    given = lessons(np.eye(2).tolist(), [[0, 0], [0, 0]], labels=SKILLS[:2])
    router = SkillProfile()
    router.fit(given)
    assert np.allclose(router.score(given.batch).weights, 0.5)


def test_of_a_model_that_was_never_asked_nothing_is_known() -> None:
    given = lessons(np.eye(2).tolist(), [[1, np.nan], [0, np.nan]], labels=SKILLS[:2])
    router = SkillProfile()
    router.fit(given)
    quality = router.score(given.batch).quality
    assert np.allclose(quality[:, 0], 0.5)
    assert np.isnan(quality[:, 1]).all()
