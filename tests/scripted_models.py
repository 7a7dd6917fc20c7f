"""Models that answer by a script, for the tests of aggregators."""

from __future__ import annotations

from collections.abc import Callable

from mixtura.methods.aggregators import Aggregator, rehearse
from mixtura.types.asking import Ask, Reply, Verdict
from mixtura.types.models import ModelCard, Prompt

Script = Callable[[str, Ask], Reply | str]


def models(*names: str) -> tuple[ModelCard, ...]:
    """Cards by name, each dearer than the one before."""
    return tuple(
        ModelCard(name=name, input_price=n + 1, output_price=n + 1) for n, name in enumerate(names or ("a",))
    )


def run(
    method: Aggregator, script: Script, *names: str, text: str = "2 + 2?", **labels: str
) -> tuple[Verdict, list[str], list[Ask]]:
    """The verdict, the texts that were asked, and the asks; the script sees an ask's last message first."""
    plan = method.plan(Prompt(id="0", text=text, labels=labels), models(*names))
    verdict, asked = rehearse(plan, lambda ask: script(ask.messages[-1].content, ask))
    return verdict, [ask.messages[-1].content for ask in asked], asked


FAILED = Reply(outcome="broken")
