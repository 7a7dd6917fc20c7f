"""What a compression is asked for, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from mixtura.fitting.records import Quality

FORMATS = ("mixtura", "gguf", "compressed-tensors")
DEFAULT_TOKENS, DEFAULT_LENGTH, HELD_OUT_TOKENS = 16_384, 512, 8192
# Which kind of methods each choice names.
KIND_OF = {"prune": "pruners", "merge": "mergers", "neurons": "trimmers", "quantize": "quantizers"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What is to be done to a model; see `mixtura.compress`, whose arguments these are."""

    model: Path
    out: Path
    name: str = ""
    prune: str | None = None
    merge: str | None = None
    keep: float | None = None
    neurons: str | None = None
    keep_neurons: float | None = None
    quantize: str | None = None
    bits: float | None = None
    rest_bits: int | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    servable: bool = False
    text: Path | None = None
    tokens: int = DEFAULT_TOKENS
    length: int = DEFAULT_LENGTH
    held_out_tokens: int = HELD_OUT_TOKENS
    measure: bool = True
    seed: int = 0
    to_format: str = FORMATS[0]
    types: tuple[str, ...] = ()

    def method(self, choice: str) -> str | None:
        """The method that a choice names, if it does."""
        named: str | None = getattr(self, choice)
        return named


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRounding:
    """How far rounding moved the outputs of one layer's experts, on calibration text.

    ``error`` is the squared error of their weighted outputs as a share of these, on tokens as the
    compressed layers before made them.
    """

    layer: int
    num_experts: int
    error: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """What was done to a model and what it lost.

    Attributes:
        model: what it was made from.
        out: where it is.
        dropped: experts dropped, by decoder layer.
        width: neurons of every expert before and after, where some were taken out.
        merged: groups of experts that became one, by decoder layer.
        rounding: of every layer whose experts were rounded.
        seldom: by decoder layer, experts that stay and that fewer than ``few`` calibration tokens reached,
            with how many did.
        few: see ``seldom``.
        num_tokens: of calibration text.
        bytes_before: of all tensors.
        bytes_after: of all tensors as written; what was predicted, to the byte.
        quality: on held-out text, where it was measured.
        quality_before: the original's.
        ordinary: whether plain transformers loads it.
        untouched: bytes of tensors that are as they were.
        notes: what else there is to know.
        seconds: by step.
    """

    model: str
    out: Path
    dropped: Mapping[int, tuple[int, ...]]
    width: tuple[int, int] | None
    merged: Mapping[int, tuple[tuple[int, ...], ...]]
    rounding: tuple[LayerRounding, ...]
    seldom: Mapping[int, Mapping[int, int]]
    few: int
    num_tokens: int
    bytes_before: int
    bytes_after: int
    quality: Quality | None
    quality_before: Quality | None
    ordinary: bool
    untouched: int
    commands: tuple[str, ...]
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` reads them back."""
        return {**asdict(self), "out": str(self.out)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Compressed:
        """Read what `to_dict` wrote, also after it was JSON text."""
        qualities = {
            name: None if values[name] is None else Quality(**values[name])
            for name in ("quality", "quality_before")
        }
        by_layer = {
            "dropped": {int(k): tuple(v) for k, v in values["dropped"].items()},
            "merged": {int(k): tuple(tuple(group) for group in v) for k, v in values["merged"].items()},
            "seldom": {int(k): {int(e): int(n) for e, n in v.items()} for k, v in values["seldom"].items()},
        }
        tuples = {name: tuple(values[name]) for name in ("commands", "notes")}
        rounding = tuple(LayerRounding(**one) for one in values["rounding"])
        out = Path(values["out"])
        width = None if values["width"] is None else tuple(values["width"])
        plain = {"rounding": rounding, "out": out, "width": width}
        return Compressed(**{**values, **qualities, **by_layer, **tuples, **plain})
