"""Fast first; where that does not hold, a workflow of experts made for the problem."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import plain, question, says_yes, told
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 175,
    "title": "HDFlow: Enhancing LLM Complex Problem-Solving with Hybrid Thinking and Dynamic Workflows",
}
_VERIFY = (
    "Question:\n{question}\n\nAnswer:\n{answer}\n\nCheck the answer step by step. Is it right? End "
    "with YES or NO."
)
_DESIGN = (
    "Question:\n{question}\n\nDivide the problem among at most {most} experts who work one after the "
    "other, each seeing what the earlier ones found. Write one line for each: 'Expert: what it does'."
)
_WORK = "Question:\n{question}\n\nFound so far:\n{found}\n\nYou are this expert: {expert}. Do your part."
_END = "Question:\n{question}\n\nWhat experts found:\n{found}\n\nWrite the final answer."


@final
class HybridThinking(Aggregator):
    """Answer quickly and check it; only where the check fails design a workflow of experts and run it.

    The quick answer and its check are two calls. The slow way lets the model divide the problem among
    experts, runs them in turn, writes an answer of what they found, and checks that, for a number of rounds.

    Shapes:
        2 calls where the check says yes; at most ``2 + num_rounds * (3 + most_experts)``.

    Raises:
        SettingError: ``most_experts`` is outside [1, 32] or ``num_rounds`` outside [1, 16].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> says = lambda ask: "4" if ask.plain else "All is well. YES"
        >>> plan = HybridThinking().plan(Prompt(id="0", text="2 + 2?"), (ModelCard(name="a"),))
        >>> verdict, asked = rehearse(plan, says)
        >>> verdict.text, len(asked)
        ('4', 2)

    Differences from the paper:
        Experts are calls to the model; no code that a model wrote is run, which the published code does in
        its own process. A verdict that cannot be read counts as no, where that code accepts it when it
        chooses between the ways. If no round is checked as right the last answer is given with confidence 0.
        No reflection call before the design, and no choice among rounds. Temperature is 0, there 0.2. The
        paper's training of smaller models on workflows is left out.

    Reference:
        HDFlow: Enhancing LLM Complex Problem-Solving with Hybrid Thinking and Dynamic Workflows (paper 175);
        code wenlinyao/HDFlow.
    """

    def __init__(self, *, most_experts: int = 4, num_rounds: int = 1) -> None:
        check_range(type(self).__name__, "most_experts", most_experts, 1, 32)
        check_range(type(self).__name__, "num_rounds", num_rounds, 1, 16)
        self.most_experts = most_experts
        self.num_rounds = num_rounds

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        name, asked = models[0].name, question(prompt)
        (reply,) = yield [plain(prompt, name)]
        answer = reply.text
        if reply.ok:
            (check,) = yield [told(prompt, name, _VERIFY.format(question=asked, answer=answer))]
            if says_yes(check.text):
                return Verdict(answer, 1.0)
        for _ in range(self.num_rounds):
            text = _DESIGN.format(question=asked, most=self.most_experts)
            (design,) = yield [told(prompt, name, text)]
            experts = re.findall(r"^\W*expert\s*\d*\s*:\s*(.+)$", design.text, re.IGNORECASE | re.MULTILINE)
            found: list[str] = []
            for expert in experts[: self.most_experts]:
                shown = "\n\n".join(found) or "nothing"
                (part,) = yield [told(prompt, name, _WORK.format(question=asked, found=shown, expert=expert))]
                found += [f"{expert}:\n{part.text}"] if part.ok else []
            (end,) = yield [
                told(prompt, name, _END.format(question=asked, found="\n\n".join(found) or answer))
            ]
            answer = end.text if end.ok else answer
            if not answer:
                # There is nothing to check, and a model that is asked may well say yes to it.
                continue
            (check,) = yield [told(prompt, name, _VERIFY.format(question=asked, answer=answer))]
            if says_yes(check.text):
                return Verdict(answer, 1.0)
        return Verdict(answer, 0.0) if answer else Verdict("", abstained=True)

    def most_calls(self, num_models: int) -> int:
        return 2 + self.num_rounds * (3 + self.most_experts)
