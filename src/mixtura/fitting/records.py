"""The records a fit passes between its steps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from mixtura.fitting.palette import EXPERTS, Palette

DEFAULT_CONTEXT = 4096


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked of a fit.

    Exactly one of ``memory_bytes`` (the whole process) and ``model_memory_bytes`` (weights, cache
    and working buffers) may be given; without either the budget is half of the model's weights, or the
    least that a plan can keep. ``time_s`` is for observing and searching; writing and checking come after.
    ``work`` is where measurements are kept meanwhile: beside ``out``, where nothing else is said. ``form``
    is the format that is written. ``task`` are prompts of the user's own, and ``keep_domain`` the domain of
    text whose loss is to be least. ``allocators`` are names of methods whose mixtures are tried besides.
    """

    model: Path
    out: Path
    name: str = ""
    memory_bytes: int | None = None
    model_memory_bytes: int | None = None
    context: int = DEFAULT_CONTEXT
    text: Path | None = None
    max_kl: float | None = None
    time_s: float = 1800.0
    calibration_tokens: int = 8192
    held_out_tokens: int = 8192
    seed: int = 0
    work: Path | None = None
    form: str = "mixtura"
    task: Path | None = None
    keep_domain: str | None = None
    allocators: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Parts:
    """What is stored each in its own way, in one row: which layer and number each of the M has.

    They are the routed experts, or tensors. Where they are experts, ``least_kept`` is the fewest that the
    router of each layer can choose from.
    """

    layers: Int[ndarray, " M"]
    numbers: Int[ndarray, " M"]
    top_k: Mapping[int, int] = field(default_factory=dict)
    num_groups: Mapping[int, int] = field(default_factory=dict)
    least_kept: Mapping[int, int] = field(default_factory=dict)

    def of_layer(self, layer: int) -> Bool[ndarray, " M"]:
        """Mask of the parts of one decoder layer."""
        mask: Bool[ndarray, " M"] = np.equal(self.layers, layer)
        return mask


@final
@dataclass(frozen=True, slots=True)
class Prices:
    """What each option of each part costs in bytes and in predicted loss.

    Attributes:
        num_bytes: bytes the option takes in memory and on disk.
        errors: mean square error of the layer's output that the option makes on calibration text,
            summed over the expert's assignments and divided by the number of tokens; infinity where an
            option was not tried.
        load: assignments seen per expert; 0 for other parts.
        palette: the options.
        weights: routing weights added up per expert; None where parts are no experts.
        blocks: masks of parts whose errors cost the same; where there are none, blocks of layers are taken.
    """

    parts: Parts
    num_bytes: Int[ndarray, "M O"]
    errors: Float[ndarray, "M O"]
    load: Int[ndarray, " M"]
    palette: Palette = EXPERTS
    blocks: tuple[Bool[ndarray, " M"], ...] = ()
    weights: Float[ndarray, " M"] | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """Ways of storing that have a price, from most bytes to fewest."""
        return tuple(option for option in self.palette.stored if np.isfinite(self.errors[:, option]).all())


@final
@dataclass(frozen=True, slots=True)
class Observed:
    """What observing found: prices, each part's importance, and how many layers time did not reach."""

    prices: Prices
    importance: Float[ndarray, " M"]
    num_unseen_layers: int = 0


@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to make the model smaller: an option for every part, and why it was tried.

    ``packs_rest``: whether what is outside the experts takes 8 bits, too.
    """

    label: str
    choice: tuple[int, ...]
    packs_rest: bool = False

    @property
    def key(self) -> str:
        """Names the choice, whatever it is called."""
        rest = b"rest" if self.packs_rest else b""
        return hashlib.sha256(bytes(self.choice) + rest).hexdigest()[:16]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How far a model is from the original on held-out text.

    ``kl`` is the mean over tokens of KL(original || this) in nats, with a 95 % interval from
    resampling whole sequences; ``equal_top`` the share of positions whose most likely token is the
    same; ``perplexity`` and ``accuracy`` are by domain, with ``all`` for everything.
    """

    kl: float
    kl_low: float
    kl_high: float
    equal_top: float
    perplexity: Mapping[str, float]
    kl_by_domain: Mapping[str, float]
    accuracy: Mapping[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    seconds: float = 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A candidate with what it takes and what it loses."""

    candidate: Candidate
    expert_bytes: int
    account_bytes: int
    active_bytes: float
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` reads them back to the last bit."""
        values = asdict(self)
        values["candidate"]["choice"] = list(self.candidate.choice)
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Measured:
        """Read what `to_dict` wrote."""
        fields = values["candidate"]
        candidate = Candidate(**{**fields, "choice": tuple(fields["choice"])})
        rest = {k: v for k, v in values.items() if k not in ("candidate", "quality")}
        return Measured(candidate=candidate, quality=Quality(**values["quality"]), **rest)
