"""Skill composition: what is read step by step, and that tested sets of skills are never trained on."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest
import torch

from mixtura.data.chains import HELD_OUT_CATEGORY, SKILLS, TRAINED, chain, chains, stream_of
from mixtura.errors import SettingError, UserError
from mixtura.methods.data_mixers import Domains, Standing
from mixtura.methods.data_mixers.skill_composition import SkillComposition
from mixtura.train.config import build_config
from mixtura.train.text import training_texts


def read(mixer: SkillComposition, names: tuple[str, ...], num_steps: int, every: int) -> list[list[float]]:
    """The shares of every step."""
    known = Domains(names, torch.ones(len(names), dtype=torch.float64), num_steps, every)
    mixer.check(known)
    made: list[list[float]] = []
    while len(made) < num_steps:
        _, one = mixer.next(known, {}, Standing(len(made), torch.ones(len(names), dtype=torch.float64)))
        made += [one.weights.tolist()] * one.num_steps
    return made[:num_steps]


def test_skills_rise_by_equal_parts_and_more_are_never_read() -> None:
    names = ("chains_2", "prose", "chains_1", "chains_4", "chains_3")
    for step, shares in enumerate(read(SkillComposition(), names, 100, 7)):
        top = 1 if step < 34 else 2 if step < 67 else 3
        wanted = [float(top >= 2), 1.0, 1.0, 0.0, float(top >= 3)]
        assert shares == pytest.approx([one / sum(wanted) for one in wanted])


def test_one_skill_alone_is_the_baseline() -> None:
    assert read(SkillComposition(most=1), ("chains_1", "chains_2"), 10, 4) == [[1.0, 0.0]] * 10


def test_domains_of_too_many_skills_alone_are_refused() -> None:
    with pytest.raises(
        SettingError, match="reads domains of up to 2 skills, but those of a_3, b_4 have more"
    ):
        read(SkillComposition(most=2), ("a_3", "b_4"), 10, 4)


def skills_of(prompt: str) -> frozenset[str]:
    """The skills that a question names, read from its words."""
    found = {
        name
        for part in prompt.strip().split("; ")[1:]
        for name, skill in SKILLS.items()
        if re.fullmatch(skill.words.replace("{}", r"\d+"), part)
    }
    return frozenset(found)


@pytest.mark.parametrize("num_skills", [1, 2, 3, 4])
def test_tested_sets_are_never_trained_on(num_skills: int) -> None:
    trained = {skills_of(one.prompt) for one in islice(chains(num_skills, "training", 0), 300)}
    tested = {skills_of(one.prompt) for one in islice(chains(num_skills, "held_out", 0), 300)}
    assert all(len(one) == num_skills for one in trained | tested)
    assert num_skills == 1 or not trained & tested
    assert all(SKILLS[name].category != HELD_OUT_CATEGORY for one in trained for name in one)


def test_unknown_skills_come_only_where_asked_for() -> None:
    rng = Random(0)
    made = [skills_of(chain(2, rng, "held_out", known_skills=False).prompt) for _ in range(200)]
    assert any(not one <= set(TRAINED) for one in made)
    assert all(stream_of(one) == "held_out" for one in made)


def test_answers_are_what_the_words_say() -> None:
    one = chain(3, Random(5))
    value = int(one.prompt.split(";")[0].rpartition(" ")[2])
    for words in one.prompt.strip().split("; ")[1:]:
        numbers = [int(part) for part in words.split() if part.isdigit()]
        if "add up" in words:
            value = sum(map(int, str(value)))
        elif words.startswith("add"):
            value = (value + numbers[0]) % 100
        elif words.startswith("take"):
            value = (value - numbers[0]) % 100
        elif words.startswith("double"):
            value = 2 * value % 100
        elif words.startswith("swap"):
            value = int(f"{value:02d}"[::-1])
        else:
            value %= 10
    assert one.is_correct(f"Answer: {value}")
    assert one.answer == str(value)


def test_trainings_have_them_as_domains() -> None:
    texts = training_texts("chains_2", 0)
    assert texts[0] != texts[1]
    assert all(text.count("\n") >= 3 for text in texts[:5])
    build_config({"data": {"domains": ["chains_1", "chains_2"], "mixture": "skill_composition"}})
    with pytest.raises(UserError, match="did you mean 'chains_3'"):
        build_config({"data": {"domains": ["chain_3"]}})
