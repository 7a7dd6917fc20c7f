"""A made-up table whose best routing is known: what routers are tried on where nobody has logs."""

from __future__ import annotations

from typing import Final

import numpy as np

from mixtura.running.composing.tables import ReplayTable, make_table
from mixtura.types.models import ModelCard, Outcome, Prompt

_TASKS: Final = ("algebra", "biology", "chess", "drama")
_WORDS_A_TASK: Final = 40
_COMMON: Final = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "it",
    "for",
    "what",
    "how",
    "why",
    "when",
    "give",
    "show",
)
# Probability that an answer is right, by model and task, and the price of a token in pico-dollars.
MODELS: Final = {
    "small": ((0.45, 0.40, 0.35, 0.40), 100_000),
    "algebraist": ((0.90, 0.25, 0.55, 0.20), 200_000),
    "biologist": ((0.25, 0.90, 0.20, 0.45), 200_000),
    "large": ((0.80, 0.80, 0.75, 0.80), 2_000_000),
}


def planted(num_prompts: int = 400, seed: int = 0, holes: float = 0.0, num_samples: int = 1) -> ReplayTable:
    """Prompts of four tasks with words of their own, and four models of other strengths and prices.

    Args:
        num_prompts: in all.
        seed: of everything drawn.
        holes: share of outcomes that are missing.
        num_samples: answers of each model to each prompt, independent of each other.
    """
    generator = np.random.default_rng(seed)
    prompts, outcomes = [], []
    for number in range(num_prompts):
        task = int(generator.integers(len(_TASKS)))
        own = [f"{_TASKS[task]}{n}" for n in generator.integers(_WORDS_A_TASK, size=6)]
        words = [*own, *generator.choice(_COMMON, size=8)]
        text = " ".join(str(word) for word in generator.permutation(words))
        prompt = Prompt(id=f"q{number:05}", text=text, labels={"task": _TASKS[task], "skills": _TASKS[task]})
        prompts.append(prompt)
        for name, (chances, _) in (one for one in MODELS.items() for _ in range(num_samples)):
            right, tokens = generator.random() < chances[task], int(generator.integers(50, 150))
            if generator.random() >= holes:
                word = "right" if right else f"wrong{generator.integers(5)}"
                outcomes.append(
                    Outcome(
                        prompt=prompt.id, model=name, score=float(right), output_tokens=tokens, answer=word
                    )
                )
    cards = [ModelCard(name=name, input_price=p, output_price=p) for name, (_, p) in MODELS.items()]
    return make_table(prompts, cards, outcomes)
