"""What every method of a kind promises, as small named checks that anyone can run.

Each kind has a module here with three functions and its checks::

    def arguments() -> tuple            # what a method is constructed with, beside its settings;
                                        # arguments_of(method) where that depends on the method
    def sample(method, seed) -> object  # something a method of the kind is used on
    def use(instance, sample) -> object # what it makes of that
    def check_...(method) -> None       # one promise; raises ContractError with the reason

``method`` is a `Subject`: the class, what its file says of itself, and a way to construct it. Checks
that hold for all kinds are in `mixtura.authoring.contracts.common`. A method's tags say which promises apply
to it; its ``gaps`` name the checks it is known to fail, and must go when they pass.

>>> [outcome.check for outcome in run("caches", "lru") if not outcome.ok]
[]
"""

from __future__ import annotations

from mixtura.authoring.contracts._core import (
    Check,
    ContractError,
    Outcome,
    Subject,
    checks,
    is_slow,
    require,
    run,
    slow,
    subject,
)
from mixtura.authoring.contracts._samples import (
    relabelled,
    sample_cluster,
    sample_dense_trace,
    sample_routing,
    sample_trace,
)

__all__ = [
    "Check",
    "ContractError",
    "Outcome",
    "Subject",
    "checks",
    "is_slow",
    "relabelled",
    "require",
    "run",
    "sample_cluster",
    "sample_dense_trace",
    "sample_routing",
    "sample_trace",
    "slow",
    "subject",
]
