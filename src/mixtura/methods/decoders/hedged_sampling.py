"""One greedy answer and a few drawn ones, of which the one that agrees with the others is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from mixtura.errors import check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, Prompt
from mixtura.methods.decoders._shared import DRAWN_AT, best_place, mean, ngram_f

METHOD = {
    "paper": 182,
    "title": (
        "When Life Gives You Samples: The Benefits of Scaling up Inference Compute for Multilingual LLMs"
    ),
    "tags": ["several", "may_use:verifier"],
}


@final
class HedgedSampling(Decoder):
    """Hedge a greedy answer with drawn ones, and choose by a judge or by agreement (minimum Bayes risk).

    ``n`` answers, the first greedy. A verifier, which sees all of them at once and may so compare them by a
    checklist, chooses where one is given. Else the answer is given that shares most character n-grams with
    all others and with ``evidence`` further samples, which are never answers themselves.

    Shapes:
        Logits [n + evidence, V] to as many tokens.

    Raises:
        SettingError: a setting is out of range.

    Cost:
        The prompt is read once. Then one forward pass a token, of n + evidence rows: weights outside experts
        are read once for all of them, and up to so many times K experts a layer. Agreement is counted in n
        times (n + evidence) comparisons of texts.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> [one.temperature for one in HedgedSampling(n=3).open(sample_prompt())]
        [0.0, 0.8, 0.8]

    Differences from the paper:
        Utility is the F-score of character n-grams, where the paper uses learned metrics. Evidence samples
        are of the same prompt, where the paper draws them in another language, and are none by default (3 in
        the paper). Its checklist of one call to a judge is the user's verifier. Draws are at 0.8 where no
        temperature is asked for, between the paper's 0.7 and 0.9.

    Reference:
        When Life Gives You Samples: The Benefits of Scaling up Inference Compute for Multilingual LLMs (paper
        182).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"n": 1}
    neutral_at = (0.0,)

    def __init__(self, *, n: int = 5, evidence: int = 0) -> None:
        check_range("HedgedSampling", "n", n, 1, 1024)
        check_range("HedgedSampling", "evidence", evidence, 0, 1024)
        self.n = n
        self.evidence = evidence

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        temperature = prompt.temperature or DRAWN_AT
        drawn = (Branch(temperature=temperature),) * (self.n - 1)
        evidence = (Branch(temperature=temperature, state="evidence"),) * self.evidence
        return (Branch(temperature=0.0), *drawn, *evidence)

    def select(self, candidates: Sequence[Candidate]) -> int:
        answers = [place for place, one in enumerate(candidates) if one.branch.state != "evidence"]
        if all(candidates[place].verdicts for place in answers):
            return answers[best_place([candidates[place].verdicts[-1] for place in answers])]
        texts = [one.text for one in candidates]
        agreement = [
            mean([ngram_f(texts[place], text) for other, text in enumerate(texts) if other != place])
            for place in answers
        ]
        return answers[best_place(agreement)]
