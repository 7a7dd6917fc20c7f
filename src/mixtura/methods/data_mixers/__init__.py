"""Deciding how much of each domain a training reads, stretch by stretch, from losses on held-out text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.settings import Ranged

KIND = {
    "base": "DataMixer",
    "summary": "Decides how much of each domain a training reads, from losses on held-out text.",
    "tags": {
        "online": "reads the held-out losses while the training runs",
        "schedule": "is set before the training begins, and may change from stretch to stretch",
    },
}

State = Mapping[str, Tensor]


@final
@dataclass(frozen=True, slots=True)
class Domains:
    """What is known before the training begins.

    Attributes:
        names: of the domains.
        num_tokens: of each domain's text, float64.
        num_steps: of the whole training.
        every: steps after which the user wants a new decision.
    """

    names: tuple[str, ...]
    num_tokens: Float[Tensor, " G"]
    num_steps: int
    every: int

    @property
    def equal(self) -> Float[Tensor, " G"]:
        """The same share for each."""
        return torch.full((len(self.names),), 1 / len(self.names), dtype=torch.float64)


@final
@dataclass(frozen=True, slots=True)
class Standing:
    """Where the training is when it asks: steps that are done, and the loss of each domain's held-out text.

    Losses are means over tokens, in nats, float64 and finite.
    """

    step: int
    losses: Float[Tensor, " G"]


@final
@dataclass(frozen=True, slots=True)
class Stretch:
    """So many steps whose sequences are of the domains in these shares, which are float64 and sum to 1."""

    weights: Float[Tensor, " G"]
    num_steps: int


class DataMixer(Ranged, ABC):
    """Says, whenever a stretch of the training is done, what the next one reads.

    All that a method remembers is in its state, which is kept in the training's checkpoints: a training that
    was stopped makes the same decisions as one that was not.
    """

    def check(self, domains: Domains) -> None:
        """Refuse domains that the method cannot mix.

        Raises:
            SettingError: it cannot; the message says why.
        """
        del domains

    def start(self, domains: Domains) -> State:
        """The state before the first decision: tensors by name."""
        del domains
        return {}

    @abstractmethod
    def next(self, domains: Domains, state: State, standing: Standing) -> tuple[State, Stretch]:
        """The state after this decision, and what is read next.

        A stretch that would go on after the end of the training is cut there.
        """


def mix(mixer: DataMixer, domains: Domains, losses: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
    """The first shares that a mixer gives, for examples.

    >>> from mixtura.methods.data_mixers.uniform import Uniform
    >>> known = Domains(("code", "prose"), torch.tensor([3.0, 1.0]), 10, 5)
    >>> mix(Uniform(), known, torch.ones(2)).tolist()
    [0.5, 0.5]
    """
    return mixer.next(domains, mixer.start(domains), Standing(0, losses))[1].weights


def place_of(owner: str, name: str, domains: Domains) -> int:
    """The place of a domain that a setting names.

    Raises:
        SettingError: there is no such domain.
    """
    if name not in domains.names:
        raise SettingError(
            f"{owner} needs a domain named {name!r}, but the domains are {', '.join(domains.names)}; name one"
        )
    return domains.names.index(name)
