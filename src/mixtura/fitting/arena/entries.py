"""Who takes part: every pruner by its defaults, known criteria of families, and baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from mixtura.errors import UnknownNameError
from mixtura.methods import create, header, names
from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

KIND = "pruners"
REFERENCE = "frequency"
RANDOM = "random"
_BASELINES = (RANDOM, REFERENCE)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A pruner as it takes part.

    Attributes:
        name: what the table calls it.
        pruner: the method.
        settings: what differs from its defaults.
        protects: whether super experts, as the analysis ``super_experts`` finds them, stay.
    """

    name: str
    pruner: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    protects: bool = False

    @property
    def baseline(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.name in _BASELINES

    @property
    def reads_text(self) -> bool:
        """Whether what is observed changes its plan."""
        return self.pruner != RANDOM

    @property
    def statistics(self) -> tuple[str, ...]:
        """What has to be observed for it."""
        tags = header(KIND, self.pruner).tags + (("statistic:max_output",) if self.protects else ())
        return tuple(tag.partition(":")[2] for tag in tags if tag.startswith("statistic:"))

    def plan(self, trace: Trace, num_experts: int, seed: int) -> Plan:
        """Its plan for so many experts a layer; a method that draws lots draws them of ``seed``."""
        drawn = {one.name: seed for one in header(KIND, self.pruner).settings if one.name == "seed"}
        pruner = create(KIND, self.pruner, **{**drawn, **self.settings})
        protected = create("analyses", "super_experts").find(trace) if self.protects else {}
        plan: Plan = pruner.plan(trace, Budget(num_experts=num_experts, protected=protected))
        return plan


def _exponents(name: str, frequency: int, gate: int, norm: int) -> Entry:
    settings = {"frequency": frequency, "gate": gate, "norm": norm}
    return Entry(name=name, pruner="frequency_gate_norm", settings=settings)


_VARIANTS = (
    _exponents("gate_mean", 0, 1, 0),
    _exponents("gate_sum", 1, 1, 0),
    _exponents("ean_mean", 0, 0, 1),
    _exponents("ean_sum", 1, 0, 1),
    Entry(name="utilisation_max", pruner="utilisation", settings={"over_domains": "max"}),
    Entry(name="reap_protected", pruner="reap", protects=True),
)


def entries(only: Sequence[str] = ()) -> tuple[Entry, ...]:
    """Everyone; with ``only``, the named ones and the baselines.

    Raises:
        UnknownNameError: a name does not take part.
    """
    found = {entry.name: entry for entry in _VARIANTS}
    found |= {name: Entry(name=name, pruner=name) for name in names(KIND)}
    for name in only:
        if name not in found:
            raise UnknownNameError("entry in the arena", name, found)
    wanted = {*only, *_BASELINES} if only else set(found)
    return tuple(entry for name, entry in sorted(found.items()) if name in wanted)
