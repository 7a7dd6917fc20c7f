"""Skills and worked compositions of them, in one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import question, told
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 193,
    "title": "Skills-in-Context Prompting: Unlocking Compositionality in Large Language Models",
    "tags": ["needs:examples"],
}


@final
class SkillsInContext(Aggregator):
    """Show a model basic skills first, then worked examples that name the skills they use, then the question.

    Skills and compositions stand in one prompt, in that order, so that the model grounds each step in a
    skill.

    Shapes:
        One call.

    Raises:
        SettingError: ``most_examples`` is outside [0, 100].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> method = SkillsInContext(skills=["last letter: the last letter of 'cat' is 't'"])
        >>> method.study([("Join the last letters of 'ab cd'.", "By the skill: b, d. Answer: bd")])
        >>> plan = method.plan(Prompt(id="0", text="'ef gh'?"), (ModelCard(name="a"),))
        >>> text = rehearse(plan, lambda ask: "fh")[1][0].messages[0].content
        >>> text.index("Skills") < text.index("Examples") < text.index("'ef gh'?")
        True

    Differences from the paper:
        Only the abstract was read. Skills are a setting and examples those that are studied; the paper writes
        both by hand for each task, or lets a model write the skills. The wording around them is mixtura's.

    Reference:
        Skills-in-Context Prompting: Unlocking Compositionality in Large Language Models (paper 193).
    """

    def __init__(self, *, skills: list[str] | None = None, most_examples: int = 4) -> None:
        check_range(type(self).__name__, "most_examples", most_examples, 0, 100)
        self.skills = skills
        self.most_examples = most_examples
        self._examples: tuple[tuple[str, str], ...] = ()

    def study(self, examples: Sequence[tuple[str, str]]) -> None:
        self._examples = tuple(examples[: self.most_examples])

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        parts = []
        if self.skills:
            listed = "\n".join(f"{number}. {skill}" for number, skill in enumerate(self.skills, start=1))
            parts.append(f"Skills that you can use:\n{listed}")
        if self._examples:
            shown = "\n\n".join(f"Question: {asked}\n{worked}" for asked, worked in self._examples)
            parts.append(f"Examples of their use:\n{shown}")
        parts.append(f"Question: {question(prompt)}\nName the skills that you use.")
        (reply,) = yield [told(prompt, models[0].name, "\n\n".join(parts))]
        return Verdict(reply.text) if reply.ok else Verdict("", abstained=True)

    def most_calls(self, num_models: int) -> int:
        return 1
