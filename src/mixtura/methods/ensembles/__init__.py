"""Several whole models that share a tokenizer as one: what comes next, of what each of them says.

An ensemble is given a `Text` that several frozen models read, asks those that it wants, and says how probable
every next token is. The core (`mixtura.running.ensembling`) runs the models, keeps a cache for each, trains
what a method trains, and saves it. A model that a method does not ask is not run; it reads what it has missed
in one piece once it is asked.

What the hard ones came to:

===================================  =====================================================================
a model is run for some tokens (105) ``text.logits`` is what runs it, so that asking is all there is to say
logits of a model of its own (105)   the tag ``own_model``: a copy of one of the models, trained with the rest
two stages of training (105)         ``stages``, of which the last may learn from pairs of answers
states between layers (118)          ``text.states`` and ``text.changed``, by stacks of layers
a choice by the prompt (118)         ``text.prompt``; tokens of the prompt are never what is learnt
shares by what was said so far (145) ``Mixed.state``, handed back with the next tokens
===================================  =====================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.methods.settings import Ranged

KIND = {
    "base": "Ensemble",
    "summary": "Makes one distribution of the next token of several whole models that share a tokenizer.",
    "tags": {
        "trained": "Has parts that must be trained on text first.",
        "own_model": "Trains a model of its own, which begins as a copy of one of those given.",
        "reads:prompt": "Chooses by the whole prompt; what it says of the prompt's own tokens is void.",
        "pairs": "Its last stage of training learns from answers that are preferred to others.",
    },
}

# What a target is where nothing is to be learnt.
NO_TARGET = -100
# From the number of a stack and what its last layer returned to what the next layer is given.
Change = Callable[[int, Tensor], Tensor]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a method may know of the models, its own last where it has one: the entries of the vocabulary,
    which they share, each one's width and each one's number of layers."""

    vocabulary: int
    widths: tuple[int, ...]
    num_layers: tuple[int, ...]


@runtime_checkable
class Text(Protocol):
    """Texts of S rows side by side as several models read them; T of their columns are new.

    Attributes:
        token_ids: the new columns.
        valid: 1 where they are no padding.
        seen: the same of all columns from the first.
        prompt: by row, how many tokens at its beginning are the prompt.
        num_models: that are asked, the method's own left out.
        own: the place of the method's own model, after all others.
    """

    token_ids: Int[Tensor, "S T"]
    valid: Int[Tensor, "S T"]
    seen: Int[Tensor, "S T2"]
    prompt: Int[Tensor, " S"]
    num_models: int
    own: int

    def logits(self, model: int) -> Tensor:
        """What a model says comes after each new column [S, T, V], in float32."""

    def hidden(self, model: int) -> Tensor:
        """What a model's output layer is given for each new column [S, T, D]."""

    def states(self, model: int, stacks: int) -> tuple[Tensor, ...]:
        """What the last layer of each of so many stacks returned, for all columns from the first."""

    def changed(self, model: int, stacks: int, rows: Tensor, change: Change) -> Tensor:
        """What a model says of the new columns of some rows where ``change`` replaces these states."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """What an ensemble says of the new columns.

    Attributes:
        log_probabilities: of each token to come next; they sum to 1.
        shares: what part each model has in it.
        state: what it needs for the columns after these.
        losses: terms to add to a loss in training.
    """

    log_probabilities: Float[Tensor, "S T V"]
    shares: Float[Tensor, "S T M"]
    state: Any = None
    losses: Float[Tensor, ""] | None = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Texts to learn from.

    Attributes:
        text: as the models read it.
        targets: the token that comes after each column; `NO_TARGET` where nothing is learnt.
        before: of a pair, how probable the answers were when the stage began, as logarithms.
    """

    text: Text
    targets: Int[Tensor, "S T"]
    before: Float[Tensor, " S"] | None = None


class Ensemble(Ranged, nn.Module, ABC):
    """Says what comes next, of what several models say.

    A method that trains something makes it in `build`, says what it learns from in `loss`, and names its
    ``stages`` in order.
    """

    stages: ClassVar[tuple[str, ...]] = ()

    def build(self, facts: Facts) -> None:
        """Make the parts that are trained, before they are trained or loaded.

        Raises:
            UserError: the models do not suit the method's settings.
        """
        del facts

    @abstractmethod
    def forward(self, text: Text, state: Any = None) -> Mixed:
        """What comes after each new column of a text; ``state`` is that of the columns before."""

    def learns(self, stage: str) -> Iterable[nn.Parameter]:
        """The parameters that a stage trains, its own model's left out, which is trained in all of them."""
        del stage
        return self.parameters()

    def loss(self, stage: str, lessons: Sequence[Lesson]) -> Float[Tensor, ""]:
        """What a stage makes less: of one lesson, or of two where the stage learns from pairs."""
        del stage
        (one,) = lessons
        mixed = self(one.text)
        found = cross_entropy(mixed.log_probabilities, one.targets)
        return found if mixed.losses is None else found + mixed.losses


def cross_entropy(
    log_probabilities: Float[Tensor, "S T V"], targets: Int[Tensor, "S T"]
) -> Float[Tensor, ""]:
    """The mean loss of targets, in nats; those that are `NO_TARGET` do not count.

    >>> cross_entropy(torch.tensor([[[0.25, 0.75]]]).log(), torch.tensor([[0]])).item()  # doctest: +ELLIPSIS
    1.3862...
    """
    kept = targets != NO_TARGET
    return -chosen(log_probabilities, targets)[kept].mean()


def chosen(log_probabilities: Float[Tensor, "S T V"], targets: Int[Tensor, "S T"]) -> Float[Tensor, "S T"]:
    """What is said of each target; 0 where there is none."""
    found = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(targets == NO_TARGET, 0.0)


def all_logits(text: Text) -> Float[Tensor, "S T M V"]:
    """What every model says of the new columns."""
    return torch.stack([text.logits(place) for place in range(text.num_models)], dim=2)


def checked_shares(name: str, given: Sequence[float], number: int) -> Float[Tensor, " M"]:
    """Shares of models as settings give them, as logarithms; none given are equal ones.

    Raises:
        UserError: there are more or fewer than models, or none is above 0.
    """
    from mixtura.errors import UserError

    values = list(given) or [1.0] * number
    if len(values) != number or sum(values) <= 0:
        raise UserError(
            f"{name} needs a share for each of {number} models, one of them above 0, got {list(given)}"
        )
    shares = torch.tensor(values, dtype=torch.float32)
    return (shares / shares.sum()).log()
