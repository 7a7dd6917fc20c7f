"""Spending a budget of answers by how hard a question looks: on samples, or on a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError, UserError, check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, ModelFacts, Probe, Prompt, Sample
from mixtura.methods.decoders._difficulty import explained, fitted, key_of
from mixtura.methods.decoders._shared import answer_of, continued, ends_line, mean, most_voted, several

METHOD = {
    "paper": 170,
    "title": "Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model Parameters",
    "tags": ["several", "searches", "needs:verifier", "needs:calibration"],
}
_Way = Literal["parallel", "search"]
_POLICY: list[_Way] = ["parallel", "parallel", "search", "search", "parallel"]


@final
class ComputeOptimal(Decoder):
    """Compute-optimal test-time scaling: spend a budget on samples or a search, by a question's difficulty.

    ``budget`` answers are grown: either side by side to their ends ("parallel", best of n), or as a beam
    search by a verifier ("search"), which at the end of every line keeps the best ``budget / width`` and
    continues each ``width`` times. ``policy`` says which, from the easiest questions to the hardest, in
    so many bins of equal size; a search gains most on questions of middle difficulty, and on easy ones
    finds what pleases the verifier only. At the end the answer whose texts the verifier gives the highest
    sum of scores is given.

    How hard a question is, is predicted from what the model makes of it: ``mixtura calibrate`` learns a ridge
    regression from the mean last state of questions to how likely the model thinks their right answers.

    Shapes:
        Logits [n, V] to n tokens.

    Raises:
        SettingError: a setting is out of range.
        UserError: there is no calibration, or one with other numbers of bins.

    Cost:
        The prompt is read twice, once to see how hard it is. Then one forward pass a token, of up to
        ``budget`` rows: weights outside experts are read once for all of them, and up to budget times K
        experts a layer. The verifier is asked at the end, in a search at every step, too.

    Example:
        >>> made = ComputeOptimal(budget=4, policy=["parallel", "search", "parallel"])
        >>> [made.way(difficulty, torch.tensor([1.0, 2.0])) for difficulty in (0.5, 1.5, 9.0)]
        ['parallel', 'search', 'parallel']

    Differences from the paper:
        There the policy is what was best on a validation set for each bin and budget; here it is a setting,
        whose default is what the paper found: a search in the middle. Difficulty is predicted before anything
        is drawn, where it averages a verifier's scores of 2,048 samples, which costs more than is saved.
        Lookahead, and revisions one after the other, which need a model trained to revise, are left out.
        Steps are lines.

    Reference:
        Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model Parameters (paper
        170, abstract and descriptions by others).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"budget": 1}

    def __init__(
        self,
        *,
        budget: int = 16,
        width: int = 4,
        steps: int = 40,
        policy: list[_Way] = _POLICY,
        ridge: float = 1.0,
        mark: str | None = None,
    ) -> None:
        check_range("ComputeOptimal", "budget", budget, 1, 1024)
        check_range("ComputeOptimal", "width", width, 1, 1024)
        check_range("ComputeOptimal", "steps", steps, 0, 10_000)
        check_range("ComputeOptimal", "ridge", ridge, 1e-6, 1e6)
        if not policy:
            raise SettingError(
                "policy of ComputeOptimal must name a way for each bin, from easy to hard, such as "
                '["parallel", "search"]; got none'
            )
        self.budget, self.width, self.steps = budget, width, steps
        self.policy, self.ridge, self.mark = policy, ridge, mark

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        store = prompt.made_for_it("compute_optimal").tensors
        edges = store["edges"]
        if len(edges) != len(self.policy) - 1:
            raise UserError(
                f"the calibration has {len(edges) + 1} bins of difficulty and policy names "
                f"{len(self.policy)}; calibrate again with the same policy"
            )
        key = key_of(prompt.probe.run(prompt.token_ids).hidden)
        way = self.way(float(store["offset"] + key @ store["weights"]), edges)
        return tuple(Branch(temperature=one.temperature, state=way) for one in several(prompt, self.budget))

    def way(self, difficulty: float, edges: Float[Tensor, " _"]) -> str:
        """How a question of a difficulty is answered."""
        return self.policy[int((edges <= difficulty).sum())]

    def ends_step(self, candidate: Candidate) -> bool:
        if candidate.branch.state != "search" or len(candidate.step_ends) >= self.steps:
            return False
        return ends_line(candidate, self.mark or "\n")

    def choose(self, candidates: Sequence[Candidate]) -> Sequence[int]:
        return continued(candidates, max(1, self.budget // self.width), self.budget)

    def select(self, candidates: Sequence[Candidate]) -> int:
        scores = [one.verdicts[-1] if one.verdicts else 0.0 for one in candidates]
        # Votes are sums, so that none may count against an answer.
        least = min(0.0, *scores)
        return most_voted([answer_of(one.text) for one in candidates], [score - least for score in scores])

    def calibrate(
        self, probe: Probe, samples: Sequence[Sample], facts: ModelFacts
    ) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        del facts
        asked = [one for one in samples if 0 < one.answer_from < len(one.token_ids)]
        if len(asked) < max(2, len(self.policy)):
            raise UserError(
                f"there are {len(asked)} questions with answers, and {len(self.policy)} bins of difficulty "
                f"need {max(2, len(self.policy))} at least; give more by --text (.jsonl of prompt and answer)"
            )
        keys, hard = [], []
        for one in asked:
            ran = probe.run(one.token_ids)
            keys.append(key_of(ran.hidden[: one.answer_from]))
            said = ran.logits[one.answer_from - 1 : -1].float().log_softmax(-1).cpu()
            answer = torch.tensor(one.token_ids[one.answer_from :])
            hard.append(-float(said.gather(1, answer[:, None]).mean()))
        weights, offset, seen = fitted(torch.stack(keys), torch.tensor(hard).double(), self.ridge)
        shares = torch.arange(1, len(self.policy)).double() / len(self.policy)
        values = {"questions": len(asked), "mean_difficulty": mean(hard), "explained": explained(seen, hard)}
        return values, {"weights": weights, "offset": offset, "edges": seen.quantile(shares)}
