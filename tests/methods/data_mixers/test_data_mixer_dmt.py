"""DMT's stages counted step by step: exact amounts, and sequential training where nothing is repeated."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.data_mixers import Domains, Standing
from mixtura.methods.data_mixers.dmt import Dmt

DOMAINS = Domains(("code", "prose", "tasks"), torch.tensor([30.0, 500.0, 10.0]).double(), 200, 30)


def steps_of(mixer: Dmt) -> tuple[list[float], list[float]]:
    """Steps of each domain before general text begins, and after."""
    begin = round(mixer.first * DOMAINS.num_steps)
    parts: tuple[list[float], list[float]] = ([0.0] * 3, [0.0] * 3)
    step = 0
    while step < DOMAINS.num_steps:
        _, one = mixer.next(DOMAINS, {}, Standing(step, torch.ones(3).double()))
        for now in range(step, min(step + one.num_steps, DOMAINS.num_steps)):
            for place, weight in enumerate(one.weights.tolist()):
                parts[now >= begin][place] += weight
        step += one.num_steps
    return parts


@pytest.mark.parametrize(("first", "fraction"), [(0.5, 1 / 256), (0.25, 1.0), (0.4, 0.0)])
def test_amounts_are_exact(first: float, fraction: float) -> None:
    before, after = steps_of(Dmt(first=first, fraction=fraction))
    begin = 200 * first
    assert before == pytest.approx([begin * 0.75, 0, begin * 0.25])
    assert after == pytest.approx(
        [fraction * before[0], 200 - begin - fraction * begin, fraction * before[2]], abs=1e-9
    )


def test_the_general_domain_is_the_largest_or_the_one_named() -> None:
    for general, place in ((None, 1), ("prose", 1), ("tasks", 2)):
        _, one = Dmt(general=general, fraction=0.0).next(DOMAINS, {}, Standing(150, torch.ones(3).double()))
        assert one.weights.tolist() == [float(other == place) for other in range(3)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"general": "proze"}, "Dmt needs a domain named 'proze', but the domains are code, prose, tasks"),
        ({"first": 0.75, "fraction": 0.5}, "repeats 75 steps, but the second stage has 50"),
        ({"first": 1.0}, "the second stage has 0"),
    ],
)
def test_what_cannot_be_mixed_is_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        Dmt(**settings).check(DOMAINS)  # type: ignore[arg-type]
