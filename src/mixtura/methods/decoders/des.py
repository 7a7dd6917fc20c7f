"""Searching over the number of experts while several answers grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch

from mixtura.errors import UserError, check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, LayerFacts, Prompt, View
from mixtura.methods.decoders._shared import (
    DRAWN_AT,
    answer_of,
    best_place,
    continued,
    ends_line,
    most_voted,
    score_of,
    widths,
)
from mixtura.types.steering import Steering

METHOD = {
    "paper": 39,
    "title": "Dynamic Experts Search: Enhancing Reasoning in Mixture-of-Experts LLMs at Test Time",
    "tags": ["steers", "several", "searches", "needs:verifier", "reads:confidence"],
}


@final
class Des(Decoder):
    """Dynamic experts search: grow answers with different numbers of experts, and keep what a verifier likes.

    ``rollouts`` branches share the numbers of experts out among them. At the end of every step (a line,
    unless ``mark`` says what ends one) a verifier scores all; the best quarter stays, and each that stays is
    continued as often as makes the full number again, with the number of experts it had. After ``steps``
    steps branches grow on as they are.

    Shapes:
        Logits [n, V] to n tokens.

    Raises:
        SettingError: a setting is out of range.
        UserError: a layer has not that many experts.

    Cost:
        The prompt is read once for each number of experts. Then one forward pass a token, of up to
        ``rollouts`` rows: weights outside experts are read once for all, and each row's own number of
        experts; branches whose step is shorter wait as padding.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> branches = Des(rollouts=4, experts=[1, 3]).open(sample_prompt())
        >>> [one.views[0].steering[0].ranks.tolist() for one in branches]
        [[0, 1], [0, 1], [0, 3], [0, 3]]

    Differences from the paper:
        No code was found; this follows descriptions. Steps are lines. The numbers of experts are those from
        half to 11/8 of the model's own, which is 4 to 11 for its models of 8; of few rollouts the nearest to
        the model's own. Finished answers stay in the pool with their scores. Draws are at 0.8 where no
        temperature is asked for, as in the paper.

    Reference:
        Dynamic Experts Search: Enhancing Reasoning in Mixture-of-Experts LLMs at Test Time (paper 39).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"rollouts": 1}

    def __init__(
        self,
        *,
        rollouts: int = 32,
        experts: list[int] = [],  # noqa: B006 - never changed
        steps: int = 10,
        mark: str | None = None,
        choice: Literal["best", "vote"] = "best",
    ) -> None:
        check_range("Des", "rollouts", rollouts, 1, 1024)
        check_range("Des", "steps", steps, 0, 1000)
        for number in experts:
            check_range("Des", "experts", number, 1, 10_000)
        self.rollouts = rollouts
        self.experts = experts
        self.steps = steps
        self.mark = mark
        self.choice = choice

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        numbers = self.experts or self._around(prompt.facts.layers[0])
        temperature = prompt.temperature or (DRAWN_AT if self.rollouts > 1 else 0.0)
        views = [self._view(prompt, number) for number in numbers]
        counts = widths([1.0] * len(numbers), self.rollouts)
        return tuple(
            Branch(views=(view,), temperature=temperature)
            for view, count in zip(views, counts, strict=True)
            for _ in range(count)
        )

    def ends_step(self, candidate: Candidate) -> bool:
        return len(candidate.step_ends) < self.steps and ends_line(candidate, self.mark or "\n")

    def choose(self, candidates: Sequence[Candidate]) -> Sequence[int]:
        return continued(candidates, max(1, self.rollouts // 4), self.rollouts)

    def select(self, candidates: Sequence[Candidate]) -> int:
        if self.choice == "vote":
            return most_voted([answer_of(one.text) for one in candidates])
        return best_place([score_of(one) for one in candidates])

    def _around(self, layer: LayerFacts) -> list[int]:
        """The numbers from half to 11/8 of the model's own, at most as many as there are rollouts."""
        own = layer.top_k
        every = range(max(1, own // 2), min(layer.num_experts, own + 3 * max(own, 3) // 8) + 1)
        return sorted(sorted(every, key=lambda number: abs(number - own))[: self.rollouts])

    def _view(self, prompt: Prompt, number: int) -> View:
        if all(layer.top_k == number for layer in prompt.facts.layers):
            return View()

        def steer(layer: LayerFacts) -> Steering:
            if number > layer.num_experts:
                raise UserError(
                    f"experts of Des must be at most the {layer.num_experts} of layer {layer.index}, "
                    f"got {number}"
                )
            return Steering(ranks=torch.tensor([0, number]))

        return View(prompt.facts.steer_all(steer))
