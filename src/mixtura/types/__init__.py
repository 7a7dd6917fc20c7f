"""The records every part talks through, and the one legend of shape letters.

Letters, the same everywhere:

====== ===========================================================
T      tokens (padding included where a ``valid`` mask is given)
D      model width
F      expert width
E      experts of a layer
K      experts chosen per token
N      assignments of a token to an expert (T*K when every token chooses K)
S      sequences
L      layers
V      vocabulary
====== ===========================================================

Records are frozen. A dropped token or an expert that computes nothing is an absent assignment, so
top-k, top-p, expert choice and capacity limits are all the same `Routing`.
"""

from __future__ import annotations

import json
from abc import ABC
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, final

from mixtura.errors import UserError, suggest
from mixtura.types.adapters import Change, LowRank, MatrixShape, Own, Progress, Site
from mixtura.types.attending import Attend, AttentionInput, AttentionShape
from mixtura.types.experts import Matrices, Ran, Rows
from mixtura.types.inputs import ExpertsHandle, LayerShape, RouterInput
from mixtura.types.routing import BalancerInput, Routing

__all__ = [
    "Action",
    "Attend",
    "AttentionInput",
    "AttentionShape",
    "BalancerInput",
    "Budget",
    "Change",
    "Drop",
    "ExpertsHandle",
    "LayerShape",
    "LowRank",
    "Matrices",
    "MatrixShape",
    "Merge",
    "Own",
    "Plan",
    "Progress",
    "Quantize",
    "QuantizeMatrix",
    "Ran",
    "Result",
    "RouterInput",
    "Routing",
    "Rows",
    "Site",
    "Trim",
    "VLLM_ROUTER_COUNTS",
]

# Experts of a layer that the fused router kernel of vLLM for DeepSeek-V4 was built for; it refuses others.
VLLM_ROUTER_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a planner may spend: exactly one of a size in bytes or a count of experts per layer.

    ``num_bytes`` is for the model's weights alone (what a `Plan` changes); what context and
    working buffers need has been taken off before.

    Attributes:
        protected: by decoder layer, experts that must stay whatever a method makes of them.
        counts: how many experts a layer may have after a drop, such as `VLLM_ROUTER_COUNTS`, where what
            is to run the result does not take every number; a model that needs no drop stays as it is.
    """

    num_bytes: int | None = None
    num_experts: int | None = None
    max_kl: float | None = None
    protected: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("num_bytes", "num_experts") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"a Budget needs exactly one of num_bytes and num_experts, got {given or 'none'}")
        for name in given:
            if getattr(self, name) < 0:
                raise UserError(f"{name} of a Budget must not be negative, got {getattr(self, name)}")


_ACTIONS: dict[str, type[Action]] = {}


@dataclass(frozen=True, slots=True)
class Action(ABC):  # noqa: B024 - a record that only its subclasses fill
    """One change to a checkpoint. A subclass is a record of plain JSON values, found by its ``kind``."""

    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Slotted dataclasses are created twice; the second, final class takes the place of the first.
        super(Action, cls).__init_subclass__(**kwargs)
        _ACTIONS[cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        """The action as JSON values, its kind included."""
        return {"kind": self.kind, **asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Action:
        """The action that `to_dict` wrote.

        Raises:
            UserError: the kind is unknown or a field is missing or too many.
        """
        kind = str(values.get("kind"))
        if kind not in _ACTIONS:
            raise UserError(f"no action named {kind!r} in a plan; {suggest(kind, _ACTIONS)}")
        wanted = {item.name for item in fields(_ACTIONS[kind])}
        given = set(values) - {"kind"}
        if wanted != given:
            raise UserError(
                f"action {kind!r} of a plan needs the fields {sorted(wanted)}, got {sorted(given)}"
            )
        read = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name != "kind"}
        return _ACTIONS[kind](**read)


@final
@dataclass(frozen=True, slots=True)
class Drop(Action):
    """Remove experts of a decoder layer, with their router rows; the rest keep their order."""

    kind: ClassVar[str] = "drop"

    layer: int
    experts: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Trim(Action):
    """Remove neurons of one expert of a decoder layer: rows of its first matrices, columns of its last."""

    kind: ClassVar[str] = "trim"

    layer: int
    expert: int
    neurons: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Quantize(Action):
    """Store one expert of a decoder layer with a quantizer. ``expert`` counts before any drop."""

    kind: ClassVar[str] = "quantize"

    layer: int
    expert: int
    quantizer: str
    settings: dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class QuantizeMatrix(Action):
    """Store one matrix outside the routed experts with a quantizer. ``tensor`` is its name on disk."""

    kind: ClassVar[str] = "quantize_matrix"

    tensor: str
    quantizer: str
    settings: dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Merge(Action):
    """Store experts of a decoder layer as one, their weighted average; each keeps its row of the router.

    So a token that chooses several of them gets that one expert with the sum of their weights. Numbers count
    before any drop.

    Attributes:
        layer: number of the decoder layer.
        experts: the group. The first gives the order of hidden features, and a `Quantize` names it.
        shares: weight of each in the average; they sum to one.
        aligned: whether the hidden features of the others are first put into the order in which they are
            most like those of the first.
    """

    kind: ClassVar[str] = "merge"

    layer: int
    experts: tuple[int, ...]
    shares: tuple[float, ...]
    aligned: bool = False


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """What to do to a checkpoint, in order. The empty plan leaves it as it is.

    ``other_digests`` are those of further checkpoints, where one is made of several.

    >>> plan = Plan("sha256:0", (Drop(3, (1, 5)), Quantize(0, 2, "round_to_nearest", {"bits": 4})))
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    source_digest: str
    actions: tuple[Action, ...] = ()
    other_digests: tuple[str, ...] = ()

    def dropped(self) -> dict[int, tuple[int, ...]]:
        """Experts removed by layer, ascending; layers that lose none are absent."""
        gone: dict[int, set[int]] = {}
        for action in self.actions:
            if isinstance(action, Drop):
                gone.setdefault(action.layer, set()).update(action.experts)
        return {layer: tuple(sorted(experts)) for layer, experts in sorted(gone.items()) if experts}

    def trimmed(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """The neurons removed of each (layer, expert) that loses some."""
        return {(a.layer, a.expert): a.neurons for a in self.actions if isinstance(a, Trim)}

    def merged(self) -> dict[int, tuple[Merge, ...]]:
        """Groups of experts that become one, by layer; layers that have none are absent."""
        found: dict[int, list[Merge]] = {}
        for action in self.actions:
            if isinstance(action, Merge):
                found.setdefault(action.layer, []).append(action)
        return {layer: tuple(groups) for layer, groups in sorted(found.items())}

    def quantized(self) -> dict[tuple[int, int], Quantize]:
        """The quantization of each (layer, expert) that has one; the last named holds."""
        return {(a.layer, a.expert): a for a in self.actions if isinstance(a, Quantize)}

    def matrices(self) -> dict[str, QuantizeMatrix]:
        """The quantization of each matrix outside the experts that has one; the last named holds."""
        return {a.tensor: a for a in self.actions if isinstance(a, QuantizeMatrix)}

    def to_json(self) -> str:
        """The plan as JSON text, the same bytes for the same plan."""
        values: dict[str, Any] = {
            "version": 1,
            "source_digest": self.source_digest,
            "actions": [action.to_dict() for action in self.actions],
        }
        if self.other_digests:
            values["other_digests"] = list(self.other_digests)
        return json.dumps(values, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            UserError: the text is not a plan of this version.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"this is not a plan: {error}; expected the JSON that Plan.to_json writes"
            ) from None
        if not isinstance(values, dict) or values.get("version") != 1:
            raise UserError("this is not a plan of version 1; write it again with this mixtura")
        actions = tuple(Action.from_dict(action) for action in values["actions"])
        others = tuple(map(str, values.get("other_digests", ())))
        return Plan(str(values["source_digest"]), actions, others)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured, with what is needed to measure it again."""

    name: str
    values: Mapping[str, float]
    seed: int
    hardware: str
    versions: Mapping[str, str]
    date: str
