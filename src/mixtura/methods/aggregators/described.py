"""A model reads descriptions of the others and says which of them answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import SYNTHESIS, good, numbered_list, plain, question, told
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 97,
    "title": "TCAndon-Router: Adaptive Reasoning Router for Multi-Agent Collaboration",
}
_CHOOSE = (
    "Choose who should answer a question.\n\n<agents>\n{agents}\n</agents>\n\nThink about what it "
    "needs, then end with one line: 'Agents:' and at most {most} ids with commas between, or 'Agents: "
    "none' if it is outside of what all of them do.\n\nQuestion:\n{question}"
)
_LINE = re.compile(r"agents?\s*:\s*(.*)", re.IGNORECASE)


@final
class Described(Aggregator):
    """Let the first model route: it reads descriptions of the others, reasons, and names a few that answer.

    If several answer, the router joins their answers and settles what conflicts. A question outside of what
    all of them do gets no answer. Its own calls count towards the cost like all others.

    Shapes:
        One call to choose, up to ``most_agents`` at once, one to join where there are several.

    Raises:
        SettingError: ``most_agents`` is outside [1, 100].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> models = tuple(ModelCard(name=n, description=f"does {n}") for n in ("router", "law", "tax"))
        >>> says = lambda ask: "It is about tax. Agents: A2, A9" if ask.model == "router" else "25 %"
        >>> verdict, asked = rehearse(Described().plan(Prompt(id="0", text="VAT?"), models), says)
        >>> verdict.text, [ask.model for ask in asked]
        ('25 %', ['router', 'tax'])

    Differences from the paper:
        A prompt for any model; the paper trains its router (SFT, then DAPO), with training code unpublished.
        Ids are A1, A2, ..., so that no id is part of another. Ids that are not there are dropped and never
        asked, more than ``most_agents`` are cut; the published code checks neither. Where nothing can be read
        the first of the others answers; out of scope abstains, where that code would ask an agent of that
        name. With one model alone that model answers.

    Reference:
        TCAndon-Router: Adaptive Reasoning Router for Multi-Agent Collaboration (paper 97); code
        Tencent/TCAndon-Router. The same with one agent: LLM-Based Routing in Mixture of Experts: A Novel
        Framework for Trading (paper 67).
    """

    def __init__(self, *, most_agents: int = 3) -> None:
        check_range(type(self).__name__, "most_agents", most_agents, 1, 100)
        self.most_agents = most_agents

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        router, agents = models[0].name, models[1:] or models
        ids = {f"A{number}": card for number, card in enumerate(agents, start=1)}
        listed = "\n".join(f'<agent id="{key}">{_told(card)}</agent>' for key, card in ids.items())
        text = _CHOOSE.format(agents=listed, most=self.most_agents, question=question(prompt))
        (reply,) = yield [told(prompt, router, text)]
        lines = _LINE.findall(reply.text)
        said = lines[-1] if lines else ""
        if re.fullmatch(r"\W*none\W*", said, re.IGNORECASE):
            return Verdict("", abstained=True)
        named = dict.fromkeys(key for key in re.findall(r"A\d+", said) if key in ids)
        chosen = [ids[key] for key in named][: self.most_agents] or [agents[0]]
        replies = yield [plain(prompt, card.name) for card in chosen]
        answers = good(replies)
        if len(answers) < 2:
            return Verdict(answers[0]) if answers else Verdict("", abstained=True)
        joined = SYNTHESIS.format(question=question(prompt), answers=numbered_list(answers))
        (reply,) = yield [told(prompt, router, joined)]
        return Verdict(reply.text if reply.ok else answers[0])

    def most_calls(self, num_models: int) -> int:
        return 2 + min(self.most_agents, max(1, num_models - 1))


def _told(card: ModelCard) -> str:
    return card.description or card.name
