"""What an answer is expected to cost, from prices and from what answers were so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from jaxtyping import Float

from mixtura.running.composing.tables import ReplayTable
from mixtura.types.models import ModelCard, Prompt


@final
@dataclass(frozen=True, slots=True)
class CostModel:
    """Means of what models' answers took.

    A call costs its prompt's tokens and as many tokens of answer as the model usually writes, at the card's
    prices; without prices, or where nobody counted tokens, what its answers cost on average.

    Attributes:
        output_tokens: mean of an answer, by model.
        costs: mean pico-dollars of an answer, by model.
    """

    output_tokens: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(table: ReplayTable) -> CostModel:
        """The means of a table."""
        return CostModel(_means(table, table.output_tokens), _means(table, table.costs))

    def with_models(self, other: CostModel) -> CostModel:
        """These means and those of other models."""
        return CostModel({**self.output_tokens, **other.output_tokens}, {**self.costs, **other.costs})

    def expected(self, prompts: Sequence[Prompt], cards: Sequence[ModelCard]) -> Float[np.ndarray, "P M"]:
        """Expected pico-dollars of each model's answer to each prompt; NaN where it is not known."""
        out = np.full((len(prompts), len(cards)), np.nan)
        tokens = np.array([prompt.input_tokens for prompt in prompts], dtype=float)
        usual = float(np.mean(list(self.output_tokens.values()))) if self.output_tokens else None
        for place, card in enumerate(cards):
            # A model nobody has asked yet is taken to write as much as the others.
            written = self.output_tokens.get(card.name, usual if card.name not in self.costs else None)
            if card.input_price is not None and card.output_price is not None and written is not None:
                out[:, place] = card.input_price * tokens + card.output_price * written
            elif card.name in self.costs:
                out[:, place] = self.costs[card.name]
        return out

    def to_dict(self) -> dict[str, Any]:
        """The means as JSON values."""
        return {"output_tokens": dict(self.output_tokens), "costs": dict(self.costs)}


def _means(table: ReplayTable, grid: Float[np.ndarray, "P M"]) -> dict[str, float]:
    known = ~np.isnan(grid)
    return {
        name: float(grid[known[:, place], place].mean())
        for place, name in enumerate(table.names)
        if known[:, place].any()
    }
