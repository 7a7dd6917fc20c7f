"""The search: proxies order the candidates, measured KL decides.

First the plain plan is measured, which is the baseline, and a mixture that takes an error to cost the
same in every layer: where the time is short, that is all. What is outside the experts takes 8 bits in these
where experts then get a larger width; the other way round is tried next. Then each block of parts alone is
made small, which shows how much KL an error in that block costs. With those prices each part is given an
option; the mixtures, even drops and their combinations are measured, and the best mixture is improved by
moving bytes between blocks while that helps. Last come the other uniform widths, for the curve of what
bytes buy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mixtura.errors import BudgetError
from mixtura.fitting.candidates import blocks, choice_bytes, drop_evenly, mixed, uniform
from mixtura.fitting.records import Candidate, Measured, Prices
from mixtura.fitting.rest import NAME
from mixtura.fitting.ruling import Rule, ruled

_STEP = 1.6
_ROUNDS = 1
_LEAST_KL = 1e-12


class OutOfTimeError(Exception):
    """The time the user gave is over; what has been measured stands."""


@final
@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    ``chosen`` is the least measured KL within the budget, ``uniform`` the plain plan measured
    beside it, ``tried`` everything measured, and ``left_out`` the kinds of candidates that time did not
    reach, the one it ended in first. ``too_large`` are allocators that have no mixture so small.
    """

    chosen: Measured
    uniform: Measured
    tried: tuple[Measured, ...]
    left_out: tuple[str, ...]
    too_large: tuple[str, ...] = ()

    @property
    def out_of_time(self) -> bool:
        """Whether the time ended the search."""
        return bool(self.left_out)


@final
class Search:
    """One search over candidates for a budget.

    Args:
        prices: bytes and errors of every option of every part.
        importance: how much each expert matters, for even drops.
        budget_bytes: what the parts may take together.
        measure: measures a candidate, or raises `OutOfTimeError`.
        rest_saves_bytes: what experts may take besides where the rest of the model takes 8 bits.
        rules: of allocators whose mixtures are to be tried.
        keep_domain: the domain of text whose loss is to be least, of what loses no more than the plain plan
            in all; without one, it is the loss in all that is to be least.
    """

    def __init__(
        self,
        prices: Prices,
        importance: Float[ndarray, " M"],
        budget_bytes: int,
        measure: Callable[[Candidate], Measured],
        rest_saves_bytes: int = 0,
        keep_domain: str | None = None,
        rules: Sequence[Rule] = (),
    ) -> None:
        self.prices = prices
        self.importance = importance
        self.budget_bytes = budget_bytes
        self._measure = measure
        self._tried: dict[str, Measured] = {}
        self._rest_saves_bytes = rest_saves_bytes
        self._keep_domain = keep_domain
        self._rules = tuple(rules)
        self._too_large: list[str] = []
        # What no choice may lose more than, where a domain is kept.
        self._most_kl = np.inf
        # Whether candidates store the rest of the model in 8 bits, too.
        self._packs_rest = False
        # Predicted KL per unit of error, by expert, and how much worse drops are: measured on the way.
        self._scale = np.ones(len(prices.errors))
        self._dropping = 1.0

    def run(self) -> Found:
        """Measure until there is nothing more to try or the time is over.

        Raises:
            BudgetError: nothing fits, or the time ended before anything that fits was measured.
        """
        baseline = self.baseline()
        self._most_kl = self._try(baseline).quality.kl
        steps = iter(self._steps())
        left_out: list[str] = []
        for name, step in steps:
            try:
                step()
            except OutOfTimeError:
                left_out = [name, *(later for later, _ in steps)]
        chosen = self._best()
        tried, too_large = tuple(self._tried.values()), tuple(self._too_large)
        return Found(chosen, self._tried[baseline.key], tried, tuple(left_out), too_large)

    def _kl(self, measured: Measured) -> float:
        """The loss that prices are made of: of the kept domain, or in all."""
        quality = measured.quality
        return quality.kl if self._keep_domain is None else quality.kl_by_domain[self._keep_domain]

    def _loss(self, measured: Measured) -> float:
        """What is to be least; infinite for what may not be chosen."""
        is_allowed = self._keep_domain is None or measured.quality.kl <= self._most_kl
        return self._kl(measured) if is_allowed else np.inf

    def _steps(self) -> list[tuple[str, Callable[[], None]]]:
        """What is tried after the baseline, the most promising for its time first."""
        drops = [("mixtures with drops", self._with_drops), ("even drops", self._even_drops)]
        return [
            ("a mixture of widths", self._blocks_alike),
            ("the rest as it is, or in 8 bits", self._other_rest),
            *((f"what {rule.name} allocates", partial(self._ruled, rule)) for rule in self._rules),
            ("what each block of layers costs, and mixtures by it", self._mixed_by_block),
            *(drops if self.prices.palette.drop is not None else ()),
            ("moving bytes between blocks", self._improve),
            ("every uniform width", self._uniform_widths),
        ]

    def baseline(self) -> Candidate:
        """The plain plan: the largest one width for all that fits, two bits and even drops otherwise.

        What is outside the experts takes 8 bits where that lets these have a larger width.
        """
        for option in self.prices.stored:
            for packs_rest in (False, True) if self._rest_saves_bytes else (False,):
                self._packs_rest = packs_rest
                candidate = uniform(self.prices, option)
                if choice_bytes(self.prices, candidate.choice) <= self._room_bytes:
                    return self._dressed(candidate)
        if self.prices.palette.drop is None:
            # The least of one way for all is too large, where others are smaller for some parts.
            return mixed(self.prices, self._scale, self._room_bytes, "plain mixture")
        fewest = drop_evenly(self.prices, self.importance, self.prices.stored[-1], self._room_bytes)
        return self._dressed(fewest)

    @property
    def _room_bytes(self) -> int:
        """What experts may take."""
        return self.budget_bytes + (self._rest_saves_bytes if self._packs_rest else 0)

    def _dressed(self, candidate: Candidate) -> Candidate:
        """A candidate for the experts with what is to be done to the rest."""
        if not self._packs_rest:
            return candidate
        return replace(candidate, label=f"{candidate.label}, the rest at {NAME}", packs_rest=True)

    def _blocks_alike(self) -> None:
        self._try_mixed(self._scale, "mixed widths, blocks alike")

    def _other_rest(self) -> None:
        """Whether it is better the other way: the rest as it is, or in 8 bits and more bytes for experts."""
        if not self._rest_saves_bytes:
            return
        before = self._loss(self._best())
        self._packs_rest = not self._packs_rest
        measured = self._try_mixed(self._scale, "mixed widths, blocks alike")
        if measured is None or self._loss(measured) >= before:
            self._packs_rest = not self._packs_rest

    def _ruled(self, rule: Rule) -> None:
        """The mixture that an allocator gives, where it has one so small."""
        try:
            candidate = ruled(self.prices, rule, self._room_bytes)
        except BudgetError:
            self._too_large.append(rule.name)
            return
        self._try(self._dressed(candidate))

    def _uniform_widths(self) -> None:
        candidates = [uniform(self.prices, option) for option in self.prices.stored]
        sizes = [choice_bytes(self.prices, candidate.choice) for candidate in candidates]
        # Those near the budget first.
        for place in np.argsort([abs(size - self.budget_bytes) for size in sizes], kind="stable"):
            self._try(candidates[place])

    def _mixed_by_block(self) -> None:
        scale = self._block_scale()
        scales = {
            "mixed widths": scale,
            "mixed widths, half of the block prices": np.sqrt(scale * scale.mean()),
            "mixed widths, blocks alike": np.full_like(scale, scale.mean()),
        }
        measured = {label: self._try_mixed(values, label) for label, values in scales.items()}
        losses = {label: self._loss(m) for label, m in measured.items() if m is not None}
        self._scale = scales[min(losses, key=lambda label: losses[label])] if losses else scale

    def _with_drops(self) -> None:
        self._dropping = self._drop_scale(self._scale)
        self._try_mixed(self._scale, "mixed widths and drops", drop_scale=self._dropping)

    def _block_scale(self) -> Float[ndarray, " M"]:
        """KL per unit of error for each block, measured by making that block alone small."""
        option = self._probe_option()
        scale = np.ones(len(self.prices.errors))
        palette = self.prices.palette
        for number, mask in enumerate(blocks(self.prices)):
            chosen = np.where(mask, option, palette.keep)
            label = f"block {number} at {palette.names[option]}"
            measured = self._try(Candidate(label, tuple(chosen.tolist())))
            error = float(self.prices.errors[mask, option].sum())
            scale[mask] = max(self._kl(measured), _LEAST_KL) / max(error, 1e-30)
        return scale

    def _probe_option(self) -> int:
        """The width nearest to what the budget allows on average."""
        stored = self.prices.stored
        sizes = [choice_bytes(self.prices, uniform(self.prices, option).choice) for option in stored]
        return stored[int(np.argmin([abs(size - self.budget_bytes) for size in sizes]))]

    def _drop_scale(self, scale: Float[ndarray, " M"]) -> float:
        """How much worse (or better) drops are than their predicted error says."""
        keep, drop = self.prices.palette.keep, self.prices.palette.drop
        small = drop_evenly(self.prices, self.importance, keep, self._bytes(keep) * 7 // 8)
        gone = np.asarray(small.choice) == drop
        predicted = float((self.prices.errors[gone, drop] * scale[gone]).sum())
        return self._kl(self._try(small)) / max(predicted, 1e-30)

    def _bytes(self, option: int) -> int:
        return choice_bytes(self.prices, uniform(self.prices, option).choice)

    def _even_drops(self) -> None:
        """Even drops alone, and with fewer bits for those that stay."""
        keep = self.prices.palette.keep
        for option in (keep, *self.prices.stored[:-1]):
            if self._bytes(option) > self._room_bytes:
                try:
                    even = drop_evenly(self.prices, self.importance, option, self._room_bytes)
                    self._try(self._dressed(even))
                except BudgetError:
                    continue
        for share in (8, 4):
            even = drop_evenly(self.prices, self.importance, keep, self._bytes(keep) * (share - 1) // share)
            gone = np.asarray(even.choice) == self.prices.palette.drop
            label = f"mixed widths, 1/{share} dropped evenly"
            self._try_mixed(self._scale, label, dropped=gone)

    def _try_mixed(self, scale: Float[ndarray, " M"], label: str, **rules: object) -> Measured | None:
        try:
            candidate = mixed(self.prices, scale, self._room_bytes, label, **rules)  # type: ignore[arg-type]
        except BudgetError:
            return None
        return self._try(self._dressed(candidate))

    def _improve(self) -> None:
        """Move bytes between blocks while the measured KL falls."""
        rules = {} if self._best_has_no_drops() else {"drop_scale": self._dropping}
        scale = self._scale
        best = self._loss(self._best())
        for _ in range(_ROUNDS):
            before = best
            for mask in blocks(self.prices):
                for factor in (_STEP, 1 / _STEP):
                    moved = np.where(mask, scale * factor, scale)
                    measured = self._try_mixed(moved, "mixed widths, improved", **rules)
                    if measured is not None and self._loss(measured) < best:
                        best, scale = self._loss(measured), moved
                        break
            if best == before:
                return

    def _best_has_no_drops(self) -> bool:
        return self.prices.palette.drop not in self._best().candidate.choice

    def _best(self) -> Measured:
        saved = self._rest_saves_bytes
        fitting = [
            m
            for m in self._tried.values()
            if m.expert_bytes <= self.budget_bytes + (saved if m.candidate.packs_rest else 0)
        ]
        return min(fitting, key=lambda m: (self._loss(m), m.expert_bytes))

    def _try(self, candidate: Candidate) -> Measured:
        if candidate.key not in self._tried:
            self._tried[candidate.key] = self._measure(candidate)
        return self._tried[candidate.key]
