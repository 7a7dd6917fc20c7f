"""Each step of a solution looks up like steps before it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import alike, is_concluded, plain, question, told
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 149,
    "title": "BoostStep: Boosting mathematical capability of Large Language Models via improved single-step "
    "reasoning",
    "tags": ["needs:examples"],
}
_STEP = (
    "Problem:\n{question}\n\nSteps so far:\n{steps}\n\nWrite only the next step. Where the problem is "
    "solved by it, end it with 'Answer: ...'."
)
_LIKE = "\n\nA step like yours, from the problem {known!r}:\n{step}\n\nTake your step again with it in mind."


@final
class BoostStep(Aggregator):
    """Solve a problem step by step; each step is tried, compared with known steps, and taken again with one.

    The first try of a step is what is looked up, so that what is shown is like the step and not only like the
    problem. Where no known step is like it the first try stays.

    Known steps are studied: a problem and one step of its solution each.

    Shapes:
        One call a step and one more where a like step is known; at most ``2 * most_steps + 1``.

    Raises:
        SettingError: ``most_steps`` is outside [1, 200] or ``likeness`` outside [0, 1].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> method = BoostStep()
        >>> method.study([("3x = 6", "Divide both sides by 3")])
        >>> first, again = "Divide both sides by 2", "Answer: 2"
        >>> says = lambda ask: again if "in mind" in ask.messages[-1].content else first
        >>> plan = method.plan(Prompt(id="0", text="2x = 4"), (ModelCard(name="a"),))
        >>> verdict, asked = rehearse(plan, says)
        >>> verdict.text, len(asked)
        ('Answer: 2', 2)

    Differences from the paper:
        Likeness is the cosine of counts of words, without weights for rare ones (TF-IDF there), with the
        published threshold of 0.7 and 20 steps. Below the threshold the first try stays; the published code
        makes the same call once more. A step that repeats the one before it, and the bound, end the loop, and
        the problem is asked as it is. Tree search with a reward model is left out.

    Reference:
        BoostStep: Boosting mathematical capability of Large Language Models via improved single-step
        reasoning (paper 149); code beichenzbc/BoostStep.
    """

    def __init__(self, *, most_steps: int = 20, likeness: float = 0.7) -> None:
        check_range(type(self).__name__, "most_steps", most_steps, 1, 200)
        check_range(type(self).__name__, "likeness", likeness, 0, 1)
        self.most_steps = most_steps
        self.likeness = likeness
        self._known: tuple[tuple[str, str], ...] = ()

    def study(self, examples: Sequence[tuple[str, str]]) -> None:
        self._known = tuple(examples)

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        name, asked = models[0].name, question(prompt)
        steps: list[str] = []
        for _ in range(self.most_steps):
            text = _STEP.format(question=asked, steps="\n".join(steps) or "none")
            (reply,) = yield [told(prompt, name, text)]
            if not reply.ok:
                break
            step = reply.text
            known = self._nearest(step)
            if known is not None:
                (reply,) = yield [told(prompt, name, text + _LIKE.format(known=known[0], step=known[1]))]
                step = reply.text if reply.ok else step
            if is_concluded(step):
                return Verdict(step)
            if steps and step == steps[-1]:
                break
            steps.append(step)
        (reply,) = yield [plain(prompt, name)]
        if reply.ok:
            return Verdict(reply.text)
        return Verdict(steps[-1], 0.0) if steps else Verdict("", abstained=True)

    def _nearest(self, step: str) -> tuple[str, str] | None:
        """The known step most like one; None where none is like enough."""
        found = max(self._known, key=lambda one: alike(one[1], step), default=None)
        return found if found is not None and alike(found[1], step) >= self.likeness else None

    def most_calls(self, num_models: int) -> int:
        return 2 * self.most_steps + 1
