"""Skill composition: texts of one skill first, then of two and three at once; of more, none."""

from __future__ import annotations

import re
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.data_mixers import DataMixer, Domains, Standing, State, Stretch

METHOD = {
    "paper": 191,
    "title": "Can Models Learn Skill Composition from Examples?",
    "tags": ["schedule"],
}


@final
class SkillComposition(DataMixer):
    """Train on texts that combine few skills, rising one by one, to compose more than were ever seen.

    Compositional generalisation. Domains whose names end in ``_k`` hold texts of k skills each, such as the
    made domains ``chains_1`` to ``chains_6``. The training has as many equal parts as there are such k up to
    ``most``: in the first the smallest k is read, in each later one the next k as well, all alike. Domains of
    more skills are never read, only measured, so that ``metrics.jsonl`` says how well the model composes what
    it never saw together. Domains without a number are read throughout.

    Shapes:
        Losses ``[G]`` of G domains to shares ``[G]``.

    Raises:
        SettingError: ``most`` is not in [1, 1024], or no domain is left to be read at the start.

    Example:
        >>> from mixtura.methods.data_mixers import mix
        >>> known = Domains(("chains_1", "chains_2", "chains_4"), torch.ones(3).double(), 100, 50)
        >>> mix(SkillComposition(), known, torch.ones(3)).tolist()
        [1.0, 0.0, 0.0]

    Differences from the paper:
        The paper fine-tunes language models of 7 and 13 billion weights on short texts that GPT-4 wrote to
        show k skills of rhetoric, reasoning and common sense, graded by a model; here texts are made: a
        number goes through k operations, with a checkable answer (`mixtura.data.chains`). The abstract says
        "for increasing values of k", and that k of 2 and 3 help with 4 and 5; the parts of the training, and
        that smaller k are read on, are ours.

    Reference:
        Can Models Learn Skill Composition from Examples? (Zhao and others, 2024; paper 191). Its abstract was
        read, the paper was not.
    """

    def __init__(self, *, most: int = 3) -> None:
        self.most = self.within("most", most, 1, 1024)

    def check(self, domains: Domains) -> None:
        """Refuse domains of which none may be read."""
        if not self._levels(domains) and all(k is not None for k in _skills(domains)):
            raise SettingError(
                f"SkillComposition reads domains of up to {self.most} skills, but those of "
                f"{', '.join(domains.names)} have more; raise most, or add a domain of fewer"
            )

    def next(self, domains: Domains, state: State, standing: Standing) -> tuple[State, Stretch]:
        levels = self._levels(domains) or [0]
        part = min(standing.step * len(levels) // domains.num_steps, len(levels) - 1)
        end = -(-domains.num_steps * (part + 1) // len(levels))
        return state, Stretch(_shares(domains, levels[part]), min(domains.every, end - standing.step))

    def _levels(self, domains: Domains) -> list[int]:
        """The numbers of skills that are read in the end, ascending."""
        return sorted({k for k in _skills(domains) if k is not None and k <= self.most})


def _skills(domains: Domains) -> list[int | None]:
    """How many skills the texts of each domain combine, where the name says it."""
    found = (re.search(r"_(\d+)$", name) for name in domains.names)
    return [None if one is None else int(one.group(1)) for one in found]


def _shares(domains: Domains, most: int) -> Float[Tensor, " G"]:
    read = torch.tensor([k is None or k <= most for k in _skills(domains)], dtype=torch.float64)
    return read / read.sum()
