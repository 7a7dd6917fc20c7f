"""Names, numbers and times in texts, and which texts name the same."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

import numpy as np
from jaxtyping import Float

# Names, numbers and times; the first word of a sentence is a name only where its form says so.
_ENTITY: Final = re.compile(r"\d+(?:[.:/]\d+)*%?|(?<=[\w,;:] )[A-Z][\w'-]+|\b[A-Z]{2,}\b|\b\w+_\w+\b")


def entities_of(text: str) -> frozenset[str]:
    """What a text names, in lower case.

    >>> sorted(entities_of("go to Rome at 9:30"))
    ['9:30', 'rome']
    """
    return frozenset(found.casefold() for found in _ENTITY.findall(text))


def named_most(named: list[frozenset[str]], most: int) -> list[str]:
    """The entities that most texts name, so many at most."""
    counts = Counter(entity for one in named for entity in one)
    # One that is named once says nothing of any other text.
    ranked = sorted((-num, entity) for entity, num in counts.items() if num > 1)
    return [entity for _, entity in ranked[:most]]


def edges_of(named: list[frozenset[str]], entities: list[str]) -> Float[np.ndarray, "P E"]:
    """Which of the entities each text names: 1 where it does."""
    places = {entity: number for number, entity in enumerate(entities)}
    edges = np.zeros((len(named), len(entities)))
    for row, found in enumerate(named):
        edges[row, [places[one] for one in found if one in places]] = 1.0
    return edges
