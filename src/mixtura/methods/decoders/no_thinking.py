"""Skipping a reasoning model's thinking, and answering several times instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from mixtura.errors import check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, Prompt
from mixtura.methods.decoders._shared import DRAWN_AT, answer_of, best_place, mean, most_voted

METHOD = {
    "paper": 148,
    "title": "Reasoning Models Can Be Effective Without Thinking",
    "tags": ["several", "may_use:verifier", "reads:confidence"],
}


_THOUGHT = "<think>\nOkay, I think I have finished thinking.\n</think>\n\n"
_FINAL = "\nFinal Answer:"


@final
class NoThinking(Decoder):
    """Begin the answer with a thinking block that is finished already, draw ``n`` answers, choose one.

    A verifier chooses where one is given. Else answers vote, the surest most: by rank of self-certainty, the
    mean divergence of an answer's token distributions from the uniform one, votes weigh (n - rank + 1) to
    ``power``. With ``final`` and ``final_tokens``, an answer that has only so many tokens left is told to say
    its final answer.

    Shapes:
        Logits [n, V] to n tokens.

    Raises:
        SettingError: a setting is out of range.

    Cost:
        The prompt and the thinking block are read once. Then one forward pass a token, of n rows: weights
        outside experts are read once for all of them, and up to n times K experts a layer.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> sample_prompt().decode(NoThinking(thought="abc").open(sample_prompt())[0].forced).replace(" ", "")
        'abc'

    Differences from the paper:
        The words of the block, unless ``thought`` gives others, are the paper's in the tags of DeepSeek's
        models. The exponent of the votes is 1. Draws are at 0.8 where no temperature is asked for.

    Reference:
        Reasoning Models Can Be Effective Without Thinking (paper 148).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"n": 1, "thought": "", "final": ""}

    def __init__(
        self,
        *,
        n: int = 8,
        thought: str | None = None,
        final: str | None = None,
        final_tokens: int = 0,
        power: float = 1.0,
    ) -> None:
        check_range("NoThinking", "n", n, 1, 1024)
        check_range("NoThinking", "final_tokens", final_tokens, 0, 1 << 30)
        check_range("NoThinking", "power", power, 0, 100)
        self.n = n
        self.thought = thought
        self.final = final
        self.final_tokens = final_tokens
        self.power = power

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        temperature = prompt.temperature or (DRAWN_AT if self.n > 1 else 0.0)
        thought = _THOUGHT if self.thought is None else self.thought
        forced = prompt.encode(thought) if thought else ()
        return (Branch(temperature=temperature, forced=forced),) * self.n

    def force(self, candidate: Candidate) -> tuple[int, ...]:
        final = _FINAL if self.final is None else self.final
        words = candidate.prompt.encode(final) if final and self.final_tokens else ()
        # Where all the tokens there are were too few, the answer is the final one from its beginning.
        first = len(candidate.branch.forced)
        begun = max(candidate.prompt.max_new_tokens - self.final_tokens - len(words), first)
        said = len(candidate.token_ids) - begun
        return words[said:] if 0 <= said < len(words) else ()

    def select(self, candidates: Sequence[Candidate]) -> int:
        if all(one.verdicts for one in candidates):
            return best_place([one.verdicts[-1] for one in candidates])
        sure = [mean(one.certainties) for one in candidates]
        order = sorted(range(len(candidates)), key=lambda place: (-sure[place], place))
        weights = [0.0] * len(candidates)
        for rank, place in enumerate(order):
            weights[place] = float(len(candidates) - rank) ** self.power
        return most_voted([answer_of(one.text) for one in candidates], weights)
