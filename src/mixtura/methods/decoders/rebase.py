"""A tree search whose branches are continued in proportion to what a verifier says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

from mixtura.errors import check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, Prompt
from mixtura.methods.decoders._shared import answer_of, best_place, ends_line, most_voted, widths

METHOD = {
    "paper": 178,
    "title": ("Inference Scaling vs Reasoning: An Empirical Analysis of Compute-Optimal LLM Problem-Solving"),
    "tags": ["several", "searches", "needs:verifier"],
}


@final
class Rebase(Decoder):
    """Reward-balanced tree search (REBASE): share a width out among branches by the softmax of their scores.

    At the end of every step (a line, unless ``mark`` says what ends one) a verifier scores all branches; with
    ``width`` places, less one for each finished answer, a branch is continued in proportion to ``exp(score /
    balance)``, the best first and rounded up, so that bad ones go. An answer's score is made of its steps' by
    ``reduce``.

    Shapes:
        Logits [n, V] to n tokens.

    Raises:
        SettingError: a setting is out of range.

    Cost:
        The prompt is read once. Then one forward pass a token, of up to ``width`` rows: weights outside
        experts are read once for all, and up to width times K experts a layer; branches whose step is shorter
        wait as padding. The verifier is asked once a step.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> len(Rebase(width=4).open(sample_prompt()))
        4

    Differences from the paper:
        The search alone: training a model to think (Quiet-STaR), which the paper combines it with and finds
        worse, is not done. Steps are lines of at most ``step_tokens`` tokens, where its prompts number them.
        The limit of 1,024 tokens an answer, which its code never reaches, is the user's ``max_new_tokens``.
        Draws are at 1 where no temperature is asked for, as in its code.

    Reference:
        Inference Scaling vs Reasoning: An Empirical Analysis of Compute-Optimal LLM Problem-Solving (paper
        178); the search by thu-wyz/inference_scaling.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"width": 1}

    def __init__(
        self,
        *,
        width: int = 16,
        balance: float = 0.2,
        step_tokens: int = 256,
        depth: int = 25,
        mark: str | None = None,
        reduce: Literal["last", "min", "mean", "prod"] = "last",
        choice: Literal["best", "vote"] = "best",
    ) -> None:
        check_range("Rebase", "width", width, 1, 1024)
        check_range("Rebase", "balance", balance, 1e-6, 1e6)
        check_range("Rebase", "step_tokens", step_tokens, 1, 1 << 30)
        check_range("Rebase", "depth", depth, 0, 10_000)
        self.width = width
        self.balance = balance
        self.step_tokens = step_tokens
        self.depth = depth
        self.mark = mark
        self.reduce = reduce
        self.choice = choice

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        temperature = prompt.temperature or (1.0 if self.width > 1 else 0.0)
        return (Branch(temperature=temperature),) * self.width

    def ends_step(self, candidate: Candidate) -> bool:
        if len(candidate.step_ends) >= self.depth:
            return False
        length = len(candidate.token_ids) - (candidate.step_ends[-1] if candidate.step_ends else 0)
        return length >= self.step_tokens or ends_line(candidate, self.mark or "\n")

    def choose(self, candidates: Sequence[Candidate]) -> Sequence[int]:
        finished = [place for place, one in enumerate(candidates) if one.finished]
        growing = [place for place, one in enumerate(candidates) if not one.finished]
        scores = [candidates[place].verdicts[-1] / self.balance for place in growing]
        shares = [math.exp(score - max(scores)) for score in scores]
        counts = widths(shares, self.width - len(finished))
        return finished + [place for place, count in zip(growing, counts, strict=True) for _ in range(count)]

    def select(self, candidates: Sequence[Candidate]) -> int:
        scores = [self._reduced(one.verdicts) for one in candidates]
        if self.choice == "best":
            return best_place(scores)
        return most_voted([answer_of(one.text) for one in candidates], [max(score, 0.0) for score in scores])

    def _reduced(self, verdicts: Sequence[float]) -> float:
        if not verdicts:
            return -math.inf
        if self.reduce == "mean":
            return sum(verdicts) / len(verdicts)
        if self.reduce == "prod":
            return math.prod(verdicts)
        return min(verdicts) if self.reduce == "min" else verdicts[-1]
