"""Whole models as experts: their cards, prompts, what came of asking, and what was decided.

Letters beside those of `mixtura.types`: P prompts, M models, C width of a prompt's embedding. Money is
counted in pico-dollars, so that a price of $0.0375 a million tokens is the integer 37,500 a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

import numpy as np
from jaxtyping import Float

PICO_PER_DOLLAR = 10**12
# Text whose tokens nobody counted: English text has about four characters a token in usual vocabularies.
CHARS_PER_TOKEN = 4
Role = Literal["system", "user", "assistant"]


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is known of a model before it is asked.

    Attributes:
        name: by which everything else speaks of it.
        input_price: pico-dollars for a token that it reads; None where it is not known.
        output_price: pico-dollars for a token that it writes; None where it is not known.
        context: tokens that prompt and answer may have together; None for no limit that is known.
        max_output: tokens that an answer may have.
        abilities: what a prompt may need, such as ``tools``, ``images``, ``json``.
        description: what it is good at, in words; what routers that ask a model show it.
        num_bytes: that it takes in memory; for choices of a set of models that are held at once.
        address: where it is reached; no part of routing.
        model: its name at that address; its own name where that is empty.
    """

    name: str
    input_price: int | None = None
    output_price: int | None = None
    context: int | None = None
    max_output: int | None = None
    abilities: frozenset[str] = frozenset()
    description: str = ""
    num_bytes: int | None = None
    address: str = ""
    model: str = ""

    @property
    def is_priced(self) -> bool:
        """Whether both prices are known."""
        return self.input_price is not None and self.output_price is not None

    def cost(self, input_tokens: float, output_tokens: float) -> float | None:
        """Pico-dollars of a call with so many tokens; None where a price is not known."""
        if self.input_price is None or self.output_price is None:
            return None
        return self.input_price * input_tokens + self.output_price * output_tokens


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a model is asked.

    Attributes:
        id: by which outcomes speak of it.
        text: the question, as an encoder reads it.
        labels: what else is known of it, such as ``task``.
        needs: abilities without which a model cannot answer.
        num_tokens: that it has; estimated from the text where that is None.
        max_tokens: that its answer may have.
        messages: the conversation, where it is more than the text.
    """

    id: str
    text: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    num_tokens: int | None = None
    max_tokens: int | None = None
    messages: tuple[Message, ...] = ()

    @property
    def input_tokens(self) -> int:
        """Its tokens, estimated from its characters where nobody counted them."""
        return self.num_tokens if self.num_tokens is not None else 1 + len(self.text) // CHARS_PER_TOKEN

    def conversation(self) -> tuple[Message, ...]:
        """The messages to send: its own, else its text as the user's."""
        return self.messages or (Message("user", self.text),)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of asking a model one prompt: a row of a table.

    Attributes:
        score: how good the answer was, in [0, 1]; None where nobody judged it.
        cost: pico-dollars that it took; None where that is not known.
        propensity: with which probability a policy chose this model, where one did.
    """

    prompt: str
    model: str
    score: float | None = None
    cost: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    latency_ms: float | None = None
    propensity: float | None = None
    answer: str | None = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class PromptBatch:
    """Prompts with their embeddings, one row each, of length one or zero."""

    prompts: tuple[Prompt, ...]
    embeddings: Float[np.ndarray, "P C"]

    def __len__(self) -> int:
        return len(self.prompts)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Lessons:
    """What a router learns from.

    Attributes:
        batch: the prompts.
        cards: the models, by name ascending.
        scores: of each answer, in [0, 1]; NaN where there is none.
        costs: of each answer, in pico-dollars; NaN where that is not known.
    """

    batch: PromptBatch
    cards: tuple[ModelCard, ...]
    scores: Float[np.ndarray, "P M"]
    costs: Float[np.ndarray, "P M"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What is expected of each model for each prompt; NaN where nothing is known.

    Attributes:
        quality: expected score, in [0, 1].
        error: its standard error.
        cost: expected cost, in pico-dollars.
        weights: probability of each model, where a method draws rather than ranks; rows sum to one.
    """

    quality: Float[np.ndarray, "P M"]
    error: Float[np.ndarray, "P M"]
    cost: Float[np.ndarray, "P M"]
    weights: Float[np.ndarray, "P M"] | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is preferred, and what must not be; by default the best quality whatever it costs.

    Attributes:
        quality_per_dollar: what a dollar must buy: the model of greatest ``quality - this * dollars`` is
            chosen.
        most_cost: expected pico-dollars that a prompt may cost; the best model below is chosen, else the
            cheapest.
        least_quality: the cheapest model expected to reach this is chosen, else the best.
        budget: pico-dollars that the dearest possible answer may cost; a dearer model is not eligible.
        floor: quality below which no model is trusted: where none is surely above it, the router abstains.
        confidence: standard errors that "surely" stands for.
        fallback: the model that is asked where the router abstains; none where that is empty.
        explore: probability of a model drawn at random from those that are eligible, so that logs can
            later say what other routers would have done.
    """

    quality_per_dollar: float = 0.0
    most_cost: float | None = None
    least_quality: float | None = None
    budget: float | None = None
    floor: float | None = None
    confidence: float = 1.0
    fallback: str = ""
    explore: float = 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Which model a prompt goes to, and why.

    Attributes:
        prompt: its id.
        models: the chosen one first, then the others that are eligible, best first; empty where none is
            asked.
        propensities: the probability that each eligible model had of being chosen.
        quality: expected score of each eligible model that something is known of.
        cost: expected pico-dollars of each eligible model whose cost is known.
        ineligible: why each other model could not be chosen.
        abstained: whether no model was trusted.
        explored: whether the choice was drawn at random.
    """

    prompt: str
    models: tuple[str, ...]
    propensities: Mapping[str, float]
    quality: Mapping[str, float]
    cost: Mapping[str, float]
    ineligible: Mapping[str, str]
    abstained: bool = False
    explored: bool = False

    @property
    def model(self) -> str | None:
        """The chosen model; None where none is asked."""
        return self.models[0] if self.models else None
