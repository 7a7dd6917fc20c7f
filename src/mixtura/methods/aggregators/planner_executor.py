"""A planner that says what to do next, and an executor that does it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import question, told
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 197,
    "title": "CODA: Coordinating the Cerebrum and Cerebellum for a Dual-Brain Computer Use Agent with "
    "Decoupled Reinforcement Learning",
}
_NEXT = (
    "Task:\n{question}\n\nDone so far:\n{done}\n\nSay the one next step for an executor, in a line "
    "'Step: ...', or where the task is solved 'Done: ' and the answer."
)
_DO = "Task:\n{question}\n\nDone so far:\n{done}\n\nDo only this step and give its result: {step}"


@final
class PlannerExecutor(Aggregator):
    """Let one model plan step by step and another one carry each step out, until the planner is done.

    The planner, the first model, sees the results and says one next step at a time; the executor, the last
    model, never plans. So a dear model thinks and a cheap one works.

    Shapes:
        Two calls a step, at most ``2 * most_steps + 1``, one after the other.

    Raises:
        SettingError: ``most_steps`` is outside [1, 200].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> says = lambda ask: "42" if ask.model == "hand" else (
        ...     "Done: 42" if "1. compute" in ask.messages[-1].content else "Step: compute")
        >>> models = (ModelCard(name="head"), ModelCard(name="hand"))
        >>> verdict, asked = rehearse(PlannerExecutor().plan(Prompt(id="0", text="6 * 7?"), models), says)
        >>> verdict.text, [ask.model for ask in asked]
        ('42', ['head', 'hand', 'head'])

    Differences from the paper:
        For texts, not for a screen; nothing is trained (the paper trains the planner by GRPO for each
        application with the executor frozen, then on all successes). A reply that names no step ends the loop
        and is the answer. The bound of 8 steps is mixtura's; at it the executor's last result is the answer,
        with confidence 0.

    Reference:
        CODA: Coordinating the Cerebrum and Cerebellum for a Dual-Brain Computer Use Agent with Decoupled
        Reinforcement Learning (paper 197); code OpenIXCLab/CODA.
    """

    def __init__(self, *, most_steps: int = 8) -> None:
        check_range(type(self).__name__, "most_steps", most_steps, 1, 200)
        self.most_steps = most_steps

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        planner, executor, asked = models[0].name, models[-1].name, question(prompt)
        done: list[str] = []
        last = ""
        for number in range(1, self.most_steps + 2):
            so_far = "\n".join(done) or "nothing"
            (reply,) = yield [told(prompt, planner, _NEXT.format(question=asked, done=so_far))]
            if not reply.ok:
                break
            ended = re.findall(r"^\W*done\s*:\s*(.*)", reply.text, re.IGNORECASE | re.MULTILINE | re.DOTALL)
            steps = re.findall(r"^\W*step\s*\d*\s*:\s*(.+)$", reply.text, re.IGNORECASE | re.MULTILINE)
            if ended or not steps:
                return Verdict(ended[-1].strip() if ended and ended[-1].strip() else reply.text)
            if number > self.most_steps:
                break
            text = _DO.format(question=asked, done=so_far, step=steps[0])
            (reply,) = yield [told(prompt, executor, text)]
            last = reply.text or last
            done.append(f"{number}. {steps[0]} -> {reply.text if reply.ok else '(failed)'}")
        return Verdict(last, 0.0) if last else Verdict("", abstained=True)

    def most_calls(self, num_models: int) -> int:
        return 2 * self.most_steps + 1
