"""What an upcycling is asked for, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

# The file beside the weights that has all of it.
RESULT = "upcycled.json"
DEFAULT_TOKENS, DEFAULT_LENGTH, HELD_OUT_TOKENS = 8192, 512, 4096


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be made of which models; see `mixtura.upcycle` and `mixtura.compose`."""

    sources: tuple[Path, ...]
    out: Path
    names: tuple[str, ...] = ()
    method: str
    composes: bool = False
    experts: int | None = None
    top_k: int = 2
    target: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompts: Path | None = None
    text: Path | None = None
    tokens: int = DEFAULT_TOKENS
    length: int = DEFAULT_LENGTH
    held_out_tokens: int = HELD_OUT_TOKENS
    measure: bool = True
    seed: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A model on held-out text.

    Attributes:
        name: of the model.
        perplexity: by domain, with ``all`` for everything.
        num_tokens: that were predicted.
    """

    name: str
    perplexity: Mapping[str, float]
    num_tokens: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """The result's logits beside the first dense model's.

    Attributes:
        kl: mean Kullback-Leibler divergence to it, in nats per token.
        same_token: share of positions with the same likeliest token.
        largest: the largest difference of two logits.
        spread: the standard deviation of the dense model's logits, to see that in proportion.
    """

    kl: float
    same_token: float
    largest: float
    spread: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """How a layer's tokens were shared among its experts.

    Attributes:
        layer: the decoder layer.
        busiest: assignments of the expert with most, over an even share.
        idle: experts that no token reached.
    """

    layer: int
    busiest: float
    idle: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Upcycled:
    """What was made and how it does.

    Attributes:
        out: where it is.
        method: the upcycler, with ``settings``.
        sources: names of the dense models.
        family: of the result.
        num_experts: of each layer; ``top_k`` of them for a token.
        d_expert: width of an expert; ``shared_width`` of the one that every token visits, 0 for none.
        bytes_before: of the first dense model's tensors.
        bytes_after: of the result's tensors.
        promised: whether the method promises the dense model's function at the start.
        before: each dense model on held-out text, where that was tried.
        after: the result.
        beside: the result beside the first model, where both have one head.
        balance: of each layer.
        notes: what else there is to know.
        seconds: by step.
        added_layers: numbers of layers that were added; there are no experts then.
    """

    out: Path
    method: str
    settings: Mapping[str, Any]
    sources: tuple[str, ...]
    family: str
    num_experts: int
    top_k: int
    d_expert: int
    shared_width: int
    bytes_before: int
    bytes_after: int
    promised: bool
    before: tuple[Tried, ...] = ()
    after: Tried | None = None
    beside: Beside | None = None
    balance: tuple[Balance, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    added_layers: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` reads them back."""
        return {**asdict(self), "out": str(self.out)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Upcycled:
        """Read what `to_dict` wrote, also after it was JSON text."""
        own = dict(values)
        own["out"] = Path(own["out"])
        for name in ("sources", "notes", "added_layers"):
            own[name] = tuple(own.get(name, ()))
        own["before"] = tuple(Tried(**one) for one in own["before"])
        own["balance"] = tuple(Balance(**one) for one in own["balance"])
        own["after"] = None if own["after"] is None else Tried(**own["after"])
        own["beside"] = None if own["beside"] is None else Beside(**own["beside"])
        return Upcycled(**own)


def listed(made: Upcycled) -> str:
    """The numbers of the new layers, in words."""
    return ", ".join(map(str, made.added_layers))
