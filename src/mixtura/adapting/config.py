"""What `adapter_config.json` says of an adapter: its method and settings, and where in the model it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, final

from peft import PeftConfig

from mixtura.errors import SettingError, suggest
from mixtura.methods import declared_tags, load_method
from mixtura.methods.settings import settings
from mixtura.types.trace import Trace


@final
class AdapterType(StrEnum):
    """The one type that PEFT knows all adapters of mixtura by.

    PEFT's own list of types cannot be added to from outside; it looks types up by their text, which this has.
    """

    MIXTURA = "MIXTURA"


@final
@dataclass
class AdapterConfig(PeftConfig):
    """An adapter of the catalogue for PEFT: ``get_peft_model(model, AdapterConfig(method="expert_lora"))``.

    Attributes:
        method: an adapter's name, or the path of its file; ``mixtura methods adapters`` lists them.
        settings: its settings by name, as ``mixtura show`` lists them.
        target_modules: modules to change, by the ends of their names or one regular expression. None: all
            experts for methods that change experts, else all linear layers but routers and the last one.
        exclude_modules: of those, the ones to leave out.
        layers_to_transform: decoder layers to change; None for all.
        modules_to_save: modules that are trained and saved as whole copies.
        train_router: whether to train and save a copy of every router, too.
        experts_implementation: what transformers is to run experts by that are changed. In ``mixtura`` an
            expert's rows pass the thin matrices beside its own; in any other, and where it is None in the
            model's own, changed matrices are built for each forward pass, which takes their memory.
        base_digest: of the model, filled in; one of another structure refuses the adapter.
        bias: always "none": biases stay the base's.
    """

    method: str = "expert_lora"
    settings: dict[str, Any] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    train_router: bool = False
    experts_implementation: str | None = "mixtura"
    base_digest: str | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = AdapterType.MIXTURA
        if self.bias != "none":
            raise SettingError(f"bias must be 'none', got {self.bias!r}; biases stay the base's")
        cls = load_method("adapters", self.method)
        known = settings(cls)
        for name in self.settings:
            if name not in known:
                raise SettingError(f"{cls.__name__} has no setting {name!r}; {suggest(name, known)}")

    @property
    def tags(self) -> frozenset[str]:
        """The tags of its method."""
        return declared_tags(load_method("adapters", self.method))

    @property
    def changed(self) -> frozenset[str]:
        """What its method changes: of ``experts``, ``blocks`` and ``linear``."""
        return frozenset(tag.removeprefix("changes:") for tag in self.tags if tag.startswith("changes:"))

    @property
    def scope(self) -> str | None:
        """The sites that share something, of ``layer``, ``role`` and ``model``; None where none do."""
        return next((tag.removeprefix("shares:") for tag in self.tags if tag.startswith("shares:")), None)

    def chosen_from(self, trace: Trace) -> AdapterConfig:
        """The same with the experts that a trace of some text says, where none are named.

        See `mixtura.observe`; methods without the tag ``chooses_experts`` choose nothing.
        """
        more = load_method("adapters", self.method).settings_from(trace, self.settings)
        return replace(self, settings=self.settings | more)
