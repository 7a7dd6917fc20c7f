"""Who takes part: every pruner or merger by its defaults, known variants, and baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from mixtura.errors import UnknownNameError
from mixtura.methods import create, header, names
from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

PRUNERS, MERGERS = "pruners", "mergers"
KINDS = (PRUNERS, MERGERS)
REFERENCE = "frequency"
RANDOM = "random"
# Beside mergers, the pruners that drop as many bytes.
_BASELINES = {PRUNERS: (RANDOM, REFERENCE), MERGERS: (RANDOM, REFERENCE, "average")}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A method as it takes part.

    Attributes:
        name: what the table calls it.
        method: the pruner or merger.
        settings: what differs from its defaults.
        protects: whether super experts, as the analysis ``super_experts`` finds them, stay.
        kind: of the method.
        baseline: whether it is what the others are compared with.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    protects: bool = False
    kind: str = PRUNERS
    baseline: bool = False

    @property
    def reads_text(self) -> bool:
        """Whether what is observed changes its plan."""
        return self.method != RANDOM

    @property
    def statistics(self) -> tuple[str, ...]:
        """What has to be observed for it of every choice of an expert."""
        return (*self._tagged("statistic"), *(("max_output",) if self.protects else ()))

    @property
    def features(self) -> tuple[str, ...]:
        """What has to be observed for it of every expert."""
        return self._tagged("feature")

    def _tagged(self, family: str) -> tuple[str, ...]:
        tags = header(self.kind, self.method).tags
        return tuple(tag.partition(":")[2] for tag in tags if tag.startswith(f"{family}:"))

    def plan(self, trace: Trace, num_experts: int, seed: int) -> Plan:
        """Its plan for so many experts a layer; a method that draws lots draws them of ``seed``."""
        drawn = {one.name: seed for one in header(self.kind, self.method).settings if one.name == "seed"}
        method = create(self.kind, self.method, **{**drawn, **self.settings})
        protected = create("analyses", "super_experts").find(trace) if self.protects else {}
        plan: Plan = method.plan(trace, Budget(num_experts=num_experts, protected=protected))
        return plan


def _exponents(name: str, frequency: int, gate: int, norm: int) -> Entry:
    settings = {"frequency": frequency, "gate": gate, "norm": norm}
    return Entry(name=name, method="frequency_gate_norm", settings=settings)


def _merger(name: str, method: str, **settings: Any) -> Entry:
    return Entry(name=name, method=method, settings=settings, kind=MERGERS)


_MERGERS = (
    _merger("average_by_use", "average", by_use=True),
    _merger("m_smoe_unaligned", "m_smoe", align=False),
    _merger("hc_smoe_complete", "hc_smoe", linkage="complete"),
    _merger("hc_smoe_single", "hc_smoe", linkage="single"),
    *(Entry(name=name, method=name) for name in ("reap", REFERENCE, RANDOM)),
)
_PRUNERS = (
    _exponents("gate_mean", 0, 1, 0),
    _exponents("gate_sum", 1, 1, 0),
    _exponents("ean_mean", 0, 0, 1),
    _exponents("ean_sum", 1, 0, 1),
    Entry(name="utilisation_max", method="utilisation", settings={"over_domains": "max"}),
    Entry(name="reap_protected", method="reap", protects=True),
)


def entries(only: Sequence[str] = (), kind: str = PRUNERS) -> tuple[Entry, ...]:
    """Everyone in the arena of a kind; with ``only``, the named ones and the baselines.

    Raises:
        UnknownNameError: a name does not take part.
    """
    found = {entry.name: entry for entry in (_PRUNERS if kind == PRUNERS else _MERGERS)}
    found |= {name: Entry(name=name, method=name, kind=kind) for name in names(kind)}
    found |= {name: replace(found[name], baseline=True) for name in _BASELINES[kind]}
    for name in only:
        if name not in found:
            raise UnknownNameError("entry in the arena", name, found)
    wanted = {*only, *_BASELINES[kind]} if only else set(found)
    return tuple(entry for name, entry in sorted(found.items()) if name in wanted)
