"""Agents that see the best answers so far, judged and kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import alike, numbered_list, question, told
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 198,
    "title": "Xolver: Multi-Agent Reasoning with Holistic Experience Learning Just Like an Olympiad Team",
    "tags": ["needs:examples"],
}
_ROLES = (
    "Problem:\n{question}\n\nName {count} different experts to solve it, one a line, in a few words each."
)
_SOLVE = "You are {role}.{known}\n\nProblem:\n{question}\n\n{seen}Solve it and end with a line 'Answer: ...'."
_JUDGE = (
    "Problem:\n{question}\n\nSolution:\n{answer}\n\nHow sure are you that it is right? End with "
    "'Score: ' and 0 to 10."
)
_SEEN = "Your last attempt:\n{own}\n\nThe best attempts so far:\n{best}\n\n"


@final
class Xolver(Aggregator):
    """Let a few experts solve a problem in rounds, each seeing its last attempt and the best of all.

    A planner names the experts. Every attempt is judged, and the best are kept, so that what is kept never
    gets worse. Worked problems that were studied and are like this one are shown as experience.

    Shapes:
        One call to name experts, then ``2 * num_experts`` a round.

    Raises:
        SettingError: ``num_experts`` is outside [1, 32], ``num_rounds`` outside [1, 32] or ``num_examples``
            outside [0, 100].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> says = lambda ask: "Score: 9" if "How sure" in ask.messages[-1].content else "Answer: 4"
        >>> plan = Xolver().plan(Prompt(id="0", text="2 + 2?"), (ModelCard(name="a"),))
        >>> verdict, asked = rehearse(plan, says)
        >>> verdict, len(asked)
        (Verdict(text='Answer: 4', confidence=0.9, abstained=False), 9)

    Differences from the paper:
        The judge gives 0 to 10 where the published code gives 0 or 1, so that attempts are ranked. Experience
        is what was studied, five by likeness of words (BM25 there), looked up once a problem (there once an
        agent and round); where nothing was studied the model is not asked to recall anything. Answers are not
        written back to the experience: whether they were right is not known (the published code stores the
        last reply, right or wrong). The rounds end early where the best attempt has 10. No agent runs code.
        Two experts and two rounds are that code's defaults.

    Reference:
        Xolver: Multi-Agent Reasoning with Holistic Experience Learning Just Like an Olympiad Team (paper
            198);
        code kagnlp/Xolver.
    """

    def __init__(self, *, num_experts: int = 2, num_rounds: int = 2, num_examples: int = 5) -> None:
        check_range(type(self).__name__, "num_experts", num_experts, 1, 32)
        check_range(type(self).__name__, "num_rounds", num_rounds, 1, 32)
        check_range(type(self).__name__, "num_examples", num_examples, 0, 100)
        self.num_experts = num_experts
        self.num_rounds = num_rounds
        self.num_examples = num_examples
        self._known: tuple[tuple[str, str], ...] = ()

    def study(self, examples: Sequence[tuple[str, str]]) -> None:
        self._known = tuple(examples)

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        name, asked = models[0].name, question(prompt)
        (reply,) = yield [told(prompt, name, _ROLES.format(question=asked, count=self.num_experts))]
        lines = [re.sub(r"^\W*\d*\W*", "", line).strip() for line in reply.text.splitlines()]
        named = [line for line in lines if line][: self.num_experts]
        roles = [*named, *["an expert"] * (self.num_experts - len(named))]
        known, own = self._experience(asked), [""] * self.num_experts
        kept: list[tuple[float, str]] = []
        for _ in range(self.num_rounds):
            best = numbered_list([text for _, text in kept])
            asks = []
            for n, (role, last) in enumerate(zip(roles, own, strict=True)):
                seen = _SEEN.format(own=last, best=best) if best else ""
                text = _SOLVE.format(role=role, known=known, question=asked, seen=seen)
                asks.append(told(prompt, name, text, sample=n))
            replies = yield asks
            own = [reply.text if reply.ok else last for reply, last in zip(replies, own, strict=True)]
            fresh = [reply.text for reply in replies if reply.ok]
            if fresh:
                judged = yield [told(prompt, name, _JUDGE.format(question=asked, answer=x)) for x in fresh]
                kept += [(_score(one.text), text) for one, text in zip(judged, fresh, strict=True)]
                # Of equals the earlier stays first.
                kept = sorted(kept, key=lambda one: -one[0])[: self.num_experts]
            if kept and kept[0][0] >= 1:
                break
        return Verdict(kept[0][1], kept[0][0]) if kept else Verdict("", abstained=True)

    def _experience(self, asked: str) -> str:
        near = sorted(self._known, key=lambda one: -alike(one[0], asked))[: self.num_examples]
        return "".join(f"\n\nA problem solved before:\n{known}\n{worked}" for known, worked in near)

    def most_calls(self, num_models: int) -> int:
        return 1 + 2 * self.num_rounds * self.num_experts


def _score(text: str) -> float:
    """The score that a judge gives, from 0 to 1; 0 where there is none to read."""
    found = re.findall(r"score[\s:=*_`]*(\d+(?:\.\d+)?)", text, re.IGNORECASE)
    return min(10.0, float(found[-1])) / 10 if found else 0.0
