"""The configuration of `mixtura train`: a YAML file and ``--set key=value`` over it, checked."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, final, get_args, get_type_hints

from mixtura.data.chains import DOMAINS as CHAINS
from mixtura.data.text import DOMAINS
from mixtura.data.yaml_core import parse_yaml
from mixtura.errors import SettingError, UnknownNameError, UserError, check_range, suggest
from mixtura.methods.settings import fits, key_and_value
from mixtura.train.features import Teacher
from mixtura.train.stages import Stage, check_stages, rehearsed

Record = TypeVar("Record")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is trained on.

    Attributes:
        domains: of the text that comes with Python ("code", "prose"), of made tasks ("tasks") and of tasks
            that combine k skills ("chains_1" to "chains_6"), in equal parts unless there are stages.
        stages: a curriculum of the domains' shares and of the tasks; see `mixtura.train.stages.Stage`.
        mixture: a data mixer, by name or with settings, that decides domains' shares as the training goes;
            see `mixtura.train.mixing.Mixture`.
        text: a file or directory of one's own text in place of the domains.
        tokenizer: "specimen", or the directory of a tokenizer.
        sequence_length: tokens a sequence.
        documents_apart: whether positions start again, and attention ends, with every document; the
            tokenizer must begin texts with a token of its own.
    """

    domains: list[str] = field(default_factory=lambda: ["code", "prose", "tasks"])
    stages: list[Stage] = field(default_factory=list)
    mixture: dict[str, Any] | str | None = None
    text: str | None = None
    tokenizer: str = "specimen"
    sequence_length: int = 256
    documents_apart: bool = False

    def __post_init__(self) -> None:
        check_range("data", "sequence_length", self.sequence_length, 2, 1 << 20)
        for name in self.domains:
            if name not in (*DOMAINS, *CHAINS):
                raise UnknownNameError("domain", name, (*DOMAINS, *CHAINS))
        if not self.domains and self.text is None:
            raise SettingError(f"data needs domains or a text; the domains are {', '.join(DOMAINS)}")
        check_stages(self.stages)
        self._check_mixture()

    def _check_mixture(self) -> None:
        from mixtura.train.mixing import Mixture

        if self.mixture is None:
            return
        Mixture.read(self.mixture)
        if self.stages:
            raise SettingError("a mixture and stages both decide the domains' shares; leave one of them out")
        if self.text is None and len({*self.domains}) < 2:
            raise SettingError(
                f"a mixture needs at least two domains, got {', '.join(self.domains)}; "
                "name another in domains"
            )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """How it is trained.

    Attributes:
        num_steps: steps of the optimizer.
        num_sequences: sequences of a micro-batch on each process.
        num_accumulated: micro-batches of a step.
        learning_rate: at its peak.
        warmup_steps: steps of rising to it.
        decay_steps: last steps, in which it falls to zero.
        weight_decay, betas, clip_norm: of AdamW.
        save_steps: steps between checkpoints.
        log_steps: steps between lines of metrics.
        keep: newest checkpoints that are kept.
        exact_balance: whether losses over loads know the loads of the whole step in each of its parts, at
            the price of a forward pass; nothing changes with one part on one process.
        activation_checkpointing: whether layers are computed again instead of kept.
        bf16: whether to compute in bfloat16 where that is safe.
        start: the directory of a model of mixtura's own, such as `mixtura upcycle` makes, to begin with in
            place of a new one; its sizes are the model's.
        teacher: a model to learn from besides; see `mixtura.train.features.Teacher`.
        skip_spikes: leave out steps whose loss is so many deviations above the mean of recent steps; null for
            none.
        sparsity: a sparsifier, by name or with settings, that sets weights to zero as the training goes; null
            for none.
        tensorboard: whether to write the metrics for TensorBoard, too, in ``DIRECTORY/tensorboard``.
    """

    num_steps: int = 1000
    num_sequences: int = 8
    num_accumulated: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay_steps: int = 200
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip_norm: float = 1.0
    save_steps: int = 200
    log_steps: int = 20
    keep: int = 2
    exact_balance: bool = True
    activation_checkpointing: bool = False
    bf16: bool = False
    start: str | None = None
    teacher: Teacher | None = None
    skip_spikes: float | None = None
    sparsity: dict[str, Any] | str | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_sequences", "num_accumulated", "save_steps", "log_steps", "keep"):
            check_range("training", name, getattr(self, name), 1, 1 << 40)
        for name in ("warmup_steps", "decay_steps"):
            check_range("training", name, getattr(self, name), 0, self.num_steps)
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            check_range("training", name, getattr(self, name), 0, 1e6)
        if self.skip_spikes is not None:
            check_range("training", "skip_spikes", self.skip_spikes, 1, 1e6)
        if self.sparsity is not None:
            from mixtura.train.sparsity import read_sparsity

            read_sparsity(self.sparsity)
        if len(self.betas) != 2 or not all(fits(beta, float) and 0 <= beta < 1 for beta in self.betas):
            raise SettingError(f"betas of training must be two numbers in [0, 1), got {self.betas!r}")
        if self.warmup_steps + self.decay_steps > self.num_steps:
            raise SettingError(
                f"warmup_steps and decay_steps are {self.warmup_steps + self.decay_steps} together, "
                f"but there are {self.num_steps} steps; lower one of them"
            )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training: the model's configuration, its text and its steps.

    ``model`` holds fields of `mixtura.MixturaConfig`; sizes that follow from the tokenizer are filled in.
    """

    seed: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    training: StepConfig = field(default_factory=StepConfig)

    def __post_init__(self) -> None:
        check_range("the configuration", "seed", self.seed, 0, 1 << 62)
        if self.training.start is not None and self.model:
            raise SettingError(
                f"a training that begins with {self.training.start} has that model's sizes and methods; "
                f"leave out model, which says {', '.join(self.model)}"
            )
        rehearsed(self.data.stages, self.training.num_steps)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, every default included."""
        return asdict(self)


# What may differ between a training and its continuation.
FREE = (
    "training.save_steps",
    "training.log_steps",
    "training.eval_steps",
    "training.keep",
    "training.tensorboard",
)


def read_config(path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """The configuration in a YAML file, with ``key=value`` changes made to it.

    A key of a change is written with dots from the top (``training.num_steps=50``), or by its own name
    where that is found in one place only (``router=ada_moe``, ``num_steps=50``). Values are YAML.

    Raises:
        UserError: the file cannot be read or is no mapping.
        UnknownNameError: a key does not exist; the message has the nearest that does.
        SettingError: a value is of the wrong type or out of range.
    """
    return build_config(changed(read_yaml(Path(path)), changes))


def changed(values: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Plain values with ``key=value`` changes made to them; see `read_config` for what it raises."""
    for change in changes:
        key, value = key_and_value(change)
        _put(values, _full_key(key), parse_value(value, change))
    return values


def read_record(cls: type[Record], path: str | Path, where: str) -> Record:
    """A record of plain fields from a YAML file; see `read_config` for what it raises."""
    return record_of(cls, read_yaml(Path(path)), where)


def build_config(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that plain values describe; see `read_config` for what it raises."""
    config = record_of(TrainConfig, values, "the configuration")
    known = model_fields()
    for key in config.model:
        if key not in known:
            raise UnknownNameError("field of model", key, known)
    return config


def model_fields() -> tuple[str, ...]:
    """Names of the fields that a model's configuration has."""
    from mixtura.modeling.config import MixturaConfig

    return tuple(name for name in MixturaConfig.__annotations__ if not name.startswith("_"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file.

    Raises:
        UserError: the file cannot be read or is no mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML: it is not UTF-8 text (byte {error.start})") from None
    values = parse_yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values at its top, got a {type(values).__name__}")
    return values


def parse_value(value: str, change: str) -> Any:
    """The YAML value of a change that is written ``key=value``; raises `SettingError` for what is none."""
    try:
        return parse_yaml(value, f"the value of {change!r}")
    except UserError as error:
        raise SettingError(f"{error}; quote it") from None


def record_of(cls: type[Record], values: Any, where: str) -> Record:
    """A configuration record from plain values; see `read_config` for what it raises."""
    if not isinstance(values, Mapping):
        raise SettingError(f"{where} must hold keys and values, got {values!r}")
    hints = get_type_hints(cls)
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    read: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UnknownNameError(f"key of {where}", str(key), known)
        wanted = hints[key]
        parts = get_args(wanted)
        record = wanted if is_dataclass(wanted) else parts[0] if parts and NoneType in parts else None
        if is_dataclass(record) and not (value is None and parts):
            read[key] = record_of(record, value, key)  # type: ignore[arg-type]
        elif isinstance(value, list) and parts and is_dataclass(parts[0]):
            read[key] = [record_of(parts[0], one, key) for one in value]  # type: ignore[arg-type]
        elif fits(value, wanted):
            read[key] = value
        else:
            name = str(wanted) if parts else getattr(wanted, "__name__", str(wanted))
            hint = _hint(value, wanted)
            raise SettingError(f"{key} of {where} must be of type {name}, got {value!r}{hint}")
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name not in read and item.default is MISSING and item.default_factory is MISSING:
            raise SettingError(f"{where} needs {item.name}")
    return cls(**read)


def _hint(value: Any, wanted: Any) -> str:
    """What to write in YAML instead of a value of the wrong type, where that is easily said."""
    if wanted is bool:
        return "; write true or false"
    if fits("", wanted) and isinstance(value, bool | int | float):
        return f"; write it in quotes: '{value!r}'"
    return ""


def _places() -> dict[str, tuple[str, ...]]:
    """Full keys by their last part."""
    from mixtura.modeling.plan import MoEPlan

    groups = {
        "": tuple(item.name for item in fields(TrainConfig)),
        "data.": tuple(item.name for item in fields(DataConfig)),
        "training.": tuple(item.name for item in fields(StepConfig)),
        "model.": model_fields(),
        "model.moe.": tuple(item.name for item in fields(MoEPlan)),
    }
    found: dict[str, tuple[str, ...]] = {}
    for prefix, names in groups.items():
        for name in names:
            found[name] = (*found.get(name, ()), prefix + name)
    # The seed at the top is also the model's.
    found["seed"] = ("seed",)
    return found


def _full_key(key: str) -> tuple[str, ...]:
    first, _, rest = key.partition(".")
    places = _places()
    if first not in places:
        raise SettingError(f"no key {key!r}; {suggest(first, places)}")
    found = places[first]
    if len(found) > 1:
        raise SettingError(f"{key!r} is found in several places; write {' or '.join(found)}")
    return tuple(f"{found[0]}.{rest}".rstrip(".").split("."))


def _put(values: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    """Set a value, making mappings on the way; a method written as its name becomes a mapping."""
    here = values
    for part in key[:-1]:
        below = here.get(part)
        if isinstance(below, str):
            below = {"name": below}
        here[part] = copy.copy(below) if isinstance(below, dict) else {}
        here = here[part]
    here[key[-1]] = value
    if key[:-1] == ("model", "moe") and key[-1] in ("router", "mixer") and value is not None:
        here.pop("mixer" if key[-1] == "router" else "router", None)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Full keys whose values differ, those left out that may."""
    found = []
    for key in sorted({*old, *new}):
        first, second = old.get(key), new.get(key)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            found += differences(first, second, f"{prefix}{key}.")
        elif first != second and prefix + key not in FREE:
            found.append(prefix + key)
    return found
