"""Who takes part: decoders by their settings, and baselines of equal compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from mixtura.errors import UnknownNameError

REFERENCE = "greedy"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A decoder as it takes part.

    Attributes:
        name: what the table calls it.
        decoder: the method.
        settings: what differs from its defaults.
        temperature: of draws that the decoder leaves to the user.
        told: whether a verifier that knows the right solution scores its texts, so that it is a bound.
        calibrated: whether it is calibrated first, on texts that are no questions of the exam.
    """

    name: str
    decoder: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 0.0
    told: bool = False
    calibrated: bool = False

    @property
    def bound(self) -> bool:
        """Whether what the verifier knows can change the answer; with one branch it cannot."""
        return self.told and self.settings.get("rollouts") != 1


def _of(name: str, decoder: str, **fields: Any) -> Entry:
    return Entry(name=name, decoder=decoder, **fields)


_ENTRIES = (
    _of("greedy", "greedy"),
    _of("sampling", "sampling", temperature=0.8),
    _of("best of 8, by likelihood", "best_of_n", settings={"n": 8}),
    _of("vote of 2", "self_consistency", settings={"n": 2}),
    _of("vote of 8", "self_consistency", settings={"n": 8}),
    _of("scmoe", "scmoe"),
    _of("1 expert", "des", settings={"rollouts": 1, "experts": [1]}, told=True),
    _of("2 experts", "des", settings={"rollouts": 1, "experts": [2]}, told=True),
    _of("3 experts", "des", settings={"rollouts": 1, "experts": [3]}, told=True),
    _of("6 experts", "des", settings={"rollouts": 1, "experts": [6]}, told=True),
    _of("rewiring", "rewiring"),
    _of("rewiring, rate 3", "rewiring", settings={"rate": 3.0}),
    _of("rewiring, rate 30", "rewiring", settings={"rate": 30.0}),
    _of("modes, two fifths left out", "modes", settings={"skip": 0.4}, calibrated=True),
    _of("c3po", "c3po", calibrated=True),
    _of("multilingual steering", "multilingual_steering", calibrated=True),
    _of("experts of little weight left out", "online_pruning", calibrated=True),
    _of("left early", "spec_ee", calibrated=True),
    _of("hedged, 8", "hedged_sampling", settings={"n": 8}),
    _of("layers skipped, 1.2 times", "layer_skipping", settings={"speedup": 1.2}),
    _of("des, 8 rollouts (told)", "des", settings={"rollouts": 8}, told=True),
    _of("rebase, width 8 (told)", "rebase", settings={"width": 8}, told=True),
    _of("best of 8 (told)", "best_of_n", settings={"n": 8}, told=True),
    _of(
        "beam of 8 (told)",
        "compute_optimal",
        settings={"budget": 8, "policy": ["search"]},
        told=True,
        calibrated=True,
    ),
    _of("compute optimal, 8 (told)", "compute_optimal", settings={"budget": 8}, told=True, calibrated=True),
)

# Decoders that these questions cannot tell from others, by name, and why.
ABSENT = {
    "logit_averaging": "it needs a second model of the same vocabulary",
    "mask_experts": "it is a tool: which experts are masked is up to who uses it",
    "no_thinking": "it ends a thinking block, and the specimen writes none; its draws are those of a vote",
    "rice": "it strengthens experts of thinking tokens, and the specimen does not think",
    "think_router": "it acts while a model thinks, and the specimen does not",
}


def entries(only: Sequence[str] = ()) -> tuple[Entry, ...]:
    """Everyone; with ``only``, those whose decoder is named, and what the others are compared with.

    Raises:
        UnknownNameError: a decoder does not take part.
    """
    known = {one.decoder for one in _ENTRIES}
    for name in only:
        if name not in known:
            raise UnknownNameError("decoder in the arena", name, known)
    return tuple(one for one in _ENTRIES if not only or one.decoder in only or one.name == REFERENCE)
