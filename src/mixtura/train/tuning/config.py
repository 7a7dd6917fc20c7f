"""What `mixtura tune` is asked for: the model, the adapter, the data and the steps, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, final

from mixtura.errors import SettingError, UnknownNameError, check_range
from mixtura.methods import header
from mixtura.methods.settings import fits, key_and_value
from mixtura.train.config import parse_value, record_of
from mixtura.train.tuning.reinforcing import Reinforce


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPart:
    """Which adapter, and where in the model.

    Attributes:
        method: an adapter's name or the path of its file.
        settings: of the method, by name.
        target_modules: modules to change by the ends of their names; by default what the method is made for.
        layers: decoder layers to change; null for all.
        train_router: whether to train a copy of every router, too.
        library: directories of LoRAs of PEFT's that the method's LoRA experts begin as, one for each.
        choose_tokens: tokens of the data that choose the experts, where the method leaves that to a text.
    """

    method: str = "expert_lora"
    settings: dict[str, Any] = field(default_factory=dict)
    target_modules: list[str] | None = None
    layers: list[int] | None = None
    train_router: bool = False
    library: list[str] = field(default_factory=list)
    choose_tokens: int = 65536

    def __post_init__(self) -> None:
        check_range("adapter", "choose_tokens", self.choose_tokens, 2, 1 << 40)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TuneData:
    """What is learned from.

    Attributes:
        data: a file of records (.jsonl) or text, or a directory of them.
        eval_data: the same, of what is measured and not learned.
        sequence_length: tokens of a sequence at most.
        packing: whether documents share sequences, each apart from the others: "auto" where that gives the
            model's own predictions, which is tried first.
        learn: "answers" of conversations and questions, or "all" of them.
    """

    data: str
    eval_data: str | None = None
    sequence_length: int = 512
    packing: Literal["auto", "on", "off"] = "auto"
    learn: Literal["answers", "all"] = "answers"

    def __post_init__(self) -> None:
        check_range("data", "sequence_length", self.sequence_length, 2, 1 << 20)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSteps:
    """How it is learned.

    Attributes:
        epochs: how often the data is gone through; ``num_steps`` comes before it.
        num_steps: steps of the optimizer; null to go by ``epochs``.
        num_sequences: sequences of a micro-batch.
        num_accumulated: micro-batches of a step.
        learning_rate: at its peak.
        warmup_share: share of the steps in which it rises.
        schedule: how it falls after that.
        weight_decay, betas, clip_norm: of AdamW.
        save_steps: steps between checkpoints.
        eval_steps: steps between measurements on ``eval_data``.
        log_steps: steps between lines of metrics.
        keep: newest checkpoints that are kept.
        activation_checkpointing: whether layers are computed again instead of kept.
        tensorboard: whether to write the metrics for TensorBoard, too, in ``DIRECTORY/tensorboard``.
        reinforce: learn from drawn answers by their reward; null for learning the answers that are given. See
            `mixtura.train.tuning.reinforcing.Reinforce`.
    """

    epochs: float = 3.0
    num_steps: int | None = None
    num_sequences: int = 4
    num_accumulated: int = 1
    learning_rate: float = 5e-4
    warmup_share: float = 0.03
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip_norm: float = 1.0
    save_steps: int = 100
    eval_steps: int = 100
    log_steps: int = 10
    keep: int = 2
    activation_checkpointing: bool = False
    tensorboard: bool = False
    reinforce: Reinforce | None = None

    def __post_init__(self) -> None:
        counts = ("num_sequences", "num_accumulated", "save_steps", "eval_steps", "log_steps", "keep")
        for name in counts:
            check_range("training", name, getattr(self, name), 1, 1 << 40)
        if self.num_steps is not None:
            check_range("training", "num_steps", self.num_steps, 1, 1 << 40)
        check_range("training", "epochs", self.epochs, 1e-6, 1e6)
        check_range("training", "warmup_share", self.warmup_share, 0, 1)
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            check_range("training", name, getattr(self, name), 0, 1e6)
        if len(self.betas) != 2 or not all(fits(beta, float) and 0 <= beta < 1 for beta in self.betas):
            raise SettingError(f"betas of training must be two numbers in [0, 1), got {self.betas!r}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """A tuning: ``model`` is a directory, a hub id, or null for the specimen."""

    data: TuneData
    model: str | None = None
    seed: int = 0
    adapter: AdapterPart = field(default_factory=AdapterPart)
    training: TuneSteps = field(default_factory=TuneSteps)

    def __post_init__(self) -> None:
        check_range("the tuning", "seed", self.seed, 0, 1 << 62)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, every default included."""
        return asdict(self)


def tune_config(
    model: str | None,
    data: str,
    *,
    adapter: str = "expert_lora",
    eval_data: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> TuneConfig:
    """The configuration of a tuning, with changes by the names of its fields and of the adapter's settings.

    Raises:
        UnknownNameError: there is no such adapter or field; the message has the nearest that does.
        SettingError: a value is of the wrong type or out of range.
    """
    given = {"data": data} | ({} if eval_data is None else {"eval_data": eval_data})
    values: dict[str, Any] = {
        "model": model, "adapter": {"method": adapter, "settings": {}}, "data": given, "training": {}
    }  # fmt: skip
    places = _places(adapter)
    for name, value in (changes or {}).items():
        if name not in places:
            raise UnknownNameError(f"setting of a tuning with {adapter}", name, places)
        here = values
        for part in places[name]:
            here = here[part]
        here[name] = value
    return record_of(TuneConfig, values, "the tuning")


def parsed_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Changes written ``key=value``, their values YAML.

    Raises:
        SettingError: one is not written so.
    """
    pairs = ((change, *key_and_value(change)) for change in changes)
    return {key: parse_value(value, change) for change, key, value in pairs}


def _places(adapter: str) -> dict[str, tuple[str, ...]]:
    """Where each name that may be changed belongs; the adapter's own come first."""
    own = {setting.name: ("adapter", "settings") for setting in header("adapters", adapter).settings}
    found: dict[str, tuple[str, ...]] = {}
    for part, cls in (("adapter", AdapterPart), ("data", TuneData), ("training", TuneSteps)):
        found |= {item.name: (part,) for item in fields(cls)}
    for name in ("method", "settings", "data", "eval_data"):
        del found[name]
    # One seed says both the order of the data and what the adapter begins as.
    return {"seed": (), **found, **{name: place for name, place in own.items() if name != "seed"}}
