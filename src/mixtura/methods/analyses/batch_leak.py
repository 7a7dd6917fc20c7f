"""Does what else is in a batch change a text's own answer?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods.analyses import Analysis, Evidence, Read, Report, Study
from mixtura.methods.analyses._shared import generator_of, marks, mean_of

METHOD = {
    "paper": 98,
    "title": "Buffer Overflow in Mixture of Experts",
    "tags": ["needs:study"],
}


@final
class BatchLeak(Analysis):
    """Leaks across a batch: is a text answered otherwise because of the texts beside it?

    A text is read as the last row of a batch, beside ``mates`` other rows drawn from the text that was
    observed, and again beside other ones, ``draws`` times, in batches of the same size. A model whose tokens
    do not compete for experts answers the same. ``changed`` is the share of the text's choices of experts
    that differ, ``output_change`` how far its logits move (norm of the difference over norm), ``flips`` the
    share of tokens whose likeliest successor changes; ``noise`` is the movement when the very same batch is
    read twice. ``leaks`` is 1 where the output moves by more than ``tolerance`` beyond the noise.

    With ``as_trained`` the model routes as in training, where limits on tokens per expert hold and routers
    may choose over the whole batch: what a server would leak that ran it so.

    Shapes:
        A model of L layers and its text to L rows.

    Raises:
        SettingError: a setting is out of range.
        UserError: no text has two tokens.

    Example:
        >>> BatchLeak(mates=7).mates
        7

    Differences from the paper:
        Its abstract alone was read. It builds an adversarial batch; here neighbours are drawn, so that a leak
        that is found is real and one that is not found may still be there for chosen neighbours. The text
        stands last, where a limit that goes by arrival takes most from it.

    Reference:
        Buffer Overflow in Mixture of Experts (paper 98).
    """

    def __init__(
        self,
        *,
        texts: int = 4,
        mates: int = 3,
        draws: int = 3,
        length: int = 64,
        as_trained: bool = False,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> None:
        for name, value, most in (("texts", texts, 1000), ("mates", mates, 1000), ("draws", draws, 1000)):
            check_range("BatchLeak", name, value, 1, most)
        check_range("BatchLeak", "length", length, 2, 1 << 20)
        check_range("BatchLeak", "tolerance", tolerance, 0, 1e6)
        self.texts, self.mates, self.draws, self.length = texts, mates, draws, length
        self.as_trained, self.tolerance, self.seed = as_trained, tolerance, seed

    def measure(self, evidence: Evidence) -> Report:
        study = evidence.model()
        victims = [one.token_ids[: self.length] for one in study.passages if len(one.token_ids) > 1]
        if not victims:
            raise UserError("no text has two tokens to tell a change by; observe more text")
        pool = [token for one in study.passages for token in one.token_ids]
        generator = generator_of(self.seed)
        changed: dict[int, list[float]] = {layer.index: [] for layer in study.layers}
        moved, flips, noise = [], [], []
        for victim in victims[: self.texts]:
            first = self._rows(pool, len(victim), generator)
            plain, again = (self._read(study, first, victim) for _ in range(2))
            noise.append(_moved(plain, again))
            for _ in range(self.draws):
                other = self._read(study, self._rows(pool, len(victim), generator), victim)
                moved.append(_moved(plain, other))
                flips.append(float((plain.logits.argmax(-1) != other.logits.argmax(-1)).double().mean()))
                for layer in study.layers:
                    pair = (marks(one.chosen[layer.index], layer.num_experts) for one in (plain, other))
                    changed[layer.index].append(_left(*pair))
        rows = tuple({"layer": index, "changed": mean_of(found)} for index, found in changed.items())
        most, floor = max(moved), max(noise)
        leaks = most > floor + self.tolerance
        scalars = {
            "leaks": int(leaks),
            "changed": mean_of(row["changed"] for row in rows),
            "output_change": most,
            "flips": mean_of(flips),
            "noise": floor,
        }
        return Report(scalars, rows, (_told(leaks, most, floor, self.as_trained),))

    def _rows(self, pool: Sequence[int], width: int, generator: torch.Generator) -> list[list[int]]:
        """Stretches of the text that is there, begun anywhere and going round."""
        starts = torch.randint(0, len(pool), (self.mates,), generator=generator).tolist()
        return [[pool[(start + i) % len(pool)] for i in range(width)] for start in starts]

    def _read(self, study: Study, mates: list[list[int]], victim: Sequence[int]) -> Read:
        return study.run([*mates, victim], training=self.as_trained)[-1]


def _left(one: Bool[Tensor, "T E"], other: Bool[Tensor, "T E"]) -> float:
    """The share of one's choices that the other does not make."""
    return 1 - float((one & other).sum()) / max(1, int(one.sum()))


def _moved(one: Read, other: Read) -> float:
    """How far logits are apart, over how large they are."""
    return float((one.logits - other.logits).norm() / one.logits.norm().clamp(min=1e-30))


def _told(leaks: bool, most: float, floor: float, as_trained: bool) -> str:
    way = ", routed as in training" if as_trained else ""
    size = f"by up to {most:.3g} of its size (the same batch twice: {floor:.3g})"
    if leaks:
        return (
            f"This model leaks across a batch{way}: the texts beside it move a text's output {size}, so that "
            "whoever shares a batch can change its answer."
        )
    return f"No leak was found{way}: the texts beside it move a text's output {size}."
