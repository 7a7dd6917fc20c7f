"""Several answers of one model, and one better answer made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import SYNTHESIS, good, numbered_list, plain, question, told
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 171,
    "title": "Rethinking Mixture-of-Agents: Is Mixing Different Large Language Models Beneficial?",
    "tags": ["samples"],
}


@final
class SelfMoa(Aggregator):
    """Draw several answers of the best model and let it write one out of all of them.

    Mixing answers of different models lowers their average quality; several answers of the best one do not.
    More answers than ``window`` are joined one window after another, each beginning with the best so far, so
    that prompts stay short.

    Shapes:
        ``num_samples`` calls at once, then one a window.

    Raises:
        SettingError: ``num_samples`` is outside [1, 1000], ``window`` outside [2, 1000] or ``temperature``
            outside [0, 2].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> plan = SelfMoa(num_samples=2).plan(Prompt(id="0", text="Why?"), (ModelCard(name="a"),))
        >>> verdict, asked = rehearse(plan, lambda ask: f"draft {ask.sample}" if ask.plain else "joined")
        >>> verdict.text, len(asked), "draft 1" in asked[2].messages[0].content
        ('joined', 3, True)

    Differences from the paper:
        The words of the prompt that joins answers are mixtura's. Temperature 0.7 for drawing and 0 for
        joining, 6 answers and a window of 6 are defaults; the published repository holds no code. Where
        joining fails the first answer, or the best so far, is taken.

    Reference:
        Rethinking Mixture-of-Agents: Is Mixing Different Large Language Models Beneficial? (paper 171).
    """

    def __init__(self, *, num_samples: int = 6, window: int = 6, temperature: float = 0.7) -> None:
        check_range(type(self).__name__, "num_samples", num_samples, 1, 1000)
        check_range(type(self).__name__, "window", window, 2, 1000)
        check_range(type(self).__name__, "temperature", temperature, 0, 2)
        self.num_samples = num_samples
        self.window = window
        self.temperature = temperature

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        name = models[0].name
        replies = yield [
            plain(prompt, name, temperature=self.temperature, sample=n) for n in range(self.num_samples)
        ]
        left = good(replies)
        if not left:
            return Verdict("", abstained=True)
        while len(left) > 1:
            shown, left = left[: self.window], left[self.window :]
            text = SYNTHESIS.format(question=question(prompt), answers=numbered_list(shown))
            (reply,) = yield [told(prompt, name, text)]
            left = [reply.text if reply.ok else shown[0], *left]
        return Verdict(left[0])

    def most_calls(self, num_models: int) -> int:
        # The first window takes as many as fit, each later one all but one.
        more = max(0, self.num_samples - self.window)
        joined = (self.num_samples > 1) + -(-more // (self.window - 1))
        return self.num_samples + joined
