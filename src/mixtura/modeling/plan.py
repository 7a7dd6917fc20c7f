"""What one decoder layer's feed-forward part is made of, read from plain values and checked.

A description is a mapping such as a configuration file holds::

    {"router": {"name": "top_k", "top_k": 2}, "num_experts": 8, "d_expert": 64,
     "balancers": ["switch_loss"], "shared_width": 64}

``router`` (or ``mixer``) and the balancers are a name or a mapping of a name and settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, final, get_args, get_type_hints

from mixtura.errors import SettingError, check_range, suggest
from mixtura.methods import load_method
from mixtura.methods.settings import fits, settings
from mixtura.modeling.layer import Capacity
from mixtura.types import LayerShape

_LARGEST = 1 << 30
_LEAST = {"num_experts": 1, "d_expert": 1, "granularity": 1, "pool": 1, "shared_width": 0}


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """A method by name and the settings it was given.

    >>> Choice.read("top_k"), Choice.read({"name": "top_k", "top_k": 4}).settings
    (Choice(name='top_k', settings={}), {'top_k': 4})
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name + "".join(f", {name} {value}" for name, value in self.settings.items())

    @staticmethod
    def read(value: Any, what: str = "a method") -> Choice:
        """The choice that a name, or a mapping with the key ``name``, stands for.

        Raises:
            SettingError: it is neither.
        """
        if isinstance(value, str):
            return Choice(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return Choice(str(value["name"]), {k: v for k, v in value.items() if k != "name"})
        raise SettingError(
            f"{what} is written as a name or as a mapping with a name and settings, got {value!r}"
        )

    def method(self, kind: str) -> type[Any]:
        """The method's class."""
        return load_method(kind, self.name)

    def with_defaults(self, kind: str, **values: Any) -> dict[str, Any]:
        """The settings, and of the values given here those that the method has and were left open."""
        known = settings(self.method(kind))
        return {k: v for k, v in values.items() if k in known} | dict(self.settings)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MoEPlan:
    """The experts of one layer and what sends tokens to them.

    Attributes:
        router: a method of the kind routers; None where there is a mixer.
        mixer: a method of the kind mixers.
        experts: a method of the kind experts.
        form: a method of the kind forms; None for one pass. Sizes are those of one pass.
        num_experts: experts before they are cut finer.
        d_expert: width of an expert before it is cut finer.
        granularity: into how many narrower experts each is cut.
        shared_width: width of the expert that every token visits; 0 for none.
        shared_gated: whether its output is gated.
        shared_frozen: whether its weights stay as they are in training, as those of a trained model do.
        pool: how many adjacent layers make their experts common: each layer reaches those of all
            ``pool`` layers of its group, its own first. 1 is no pool.
        capacity: a limit on tokens per expert, as ``{"factor": 1.25}``; None for none.
        balancers: methods of the kind balancers.
    """

    router: Choice | None = Choice("top_k")
    mixer: Choice | None = None
    experts: Choice = Choice("ffn")
    form: Choice | None = None
    num_experts: int = 8
    d_expert: int = 128
    granularity: int = 1
    shared_width: int = 0
    shared_gated: bool = False
    shared_frozen: bool = False
    pool: int = 1
    capacity: Capacity | None = None
    balancers: tuple[Choice, ...] = ()

    def shape(self, d_model: int) -> LayerShape:
        """Sizes of the layer's own experts."""
        return LayerShape(d_model, self.d_expert, self.num_experts).split(self.granularity)

    @staticmethod
    def read(values: Mapping[str, Any]) -> MoEPlan:
        """The plan that a mapping describes.

        Raises:
            SettingError: a key is unknown, or a value of the wrong type or out of range.
        """
        known = {item.name for item in fields(MoEPlan)}
        for key in values:
            if key not in known:
                raise SettingError(f"an MoE layer has no setting {key!r}; {suggest(key, known)}")
        read: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
        if "mixer" in read and "router" in read:
            raise SettingError("an MoE layer has a router or a mixer, not both; set one of them to null")
        if "mixer" in read:
            read["mixer"], read["router"] = Choice.read(read["mixer"], "a mixer"), None
        elif "router" in read:
            read["router"] = Choice.read(read["router"], "a router")
        for kind, what in (("experts", "experts"), ("form", "a form")):
            if kind in read:
                read[kind] = Choice.read(read[kind], what)
        given = read.pop("balancers", ())
        named = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
        read["balancers"] = tuple(Choice.read(one, "a balancer") for one in named)
        if "capacity" in read:
            read["capacity"] = _capacity(read["capacity"])
        _check_sizes(read)
        return replace(MoEPlan(), **read)


def _check_sizes(read: Mapping[str, Any]) -> None:
    """Raise `SettingError` for a size of the wrong type or out of range."""
    for name, least in _LEAST.items():
        value = read.get(name, least)
        if not fits(value, int):
            raise SettingError(f"{name} of an MoE layer must be a whole number, got {value!r}")
        check_range("an MoE layer", name, value, least, _LARGEST)
    for name in ("shared_gated", "shared_frozen"):
        if not isinstance(read.get(name, False), bool):
            raise SettingError(f"{name} of an MoE layer must be true or false, got {read[name]!r}")


def _capacity(value: Any) -> Capacity:
    if fits(value, float):
        return Capacity(factor=value)
    known = {item.name for item in fields(Capacity)}
    if not isinstance(value, Mapping) or "factor" not in value:
        raise SettingError(f"capacity is written as {{factor: 1.25}}, got {value!r}")
    for key in value:
        if key not in known:
            raise SettingError(f"capacity has no setting {key!r}; {suggest(key, known)}")
    hints = get_type_hints(Capacity)
    for key, held in value.items():
        if not fits(held, hints[key]):
            wanted = ", ".join(map(repr, get_args(hints[key]))) or "a number"
            raise SettingError(f"{key} of capacity must be {wanted}, got {held!r}")
    return Capacity(**value)


def read_layers(
    moe: Mapping[str, Any], layers: Sequence[Any] | None, num_layers: int
) -> tuple[MoEPlan | None, ...]:
    """The plan of every decoder layer; None for a dense one.

    ``moe`` describes what all layers have in common; an entry of ``layers`` is "dense", or a mapping of
    what is different in that layer (null for nothing).

    Raises:
        SettingError: there are not as many entries as layers, or one is neither.
    """
    if layers is None:
        layers = [None] * num_layers
    if len(layers) != num_layers:
        raise SettingError(f"layers must have one entry for each of {num_layers} layers, got {len(layers)}")
    plans: list[MoEPlan | None] = []
    for entry in layers:
        if entry == "dense":
            plans.append(None)
        elif entry is None or isinstance(entry, Mapping):
            merged = dict(moe) | dict(entry or {})
            # A layer that names a mixer replaces the common router, and the other way round.
            if entry and entry.get("mixer") is not None:
                merged["router"] = None
            elif entry and entry.get("router") is not None:
                merged["mixer"] = None
            plans.append(MoEPlan.read(merged))
        else:
            raise SettingError(f"an entry of layers is 'dense', null or a mapping, got {entry!r}")
    return tuple(plans)


def read_attentions(value: Any, num_layers: int) -> tuple[Choice, ...]:
    """The attention of every decoder layer, from one for all or from a list that layers take in turn.

    >>> [one.name for one in read_attentions(["grouped_query", "sparse_heads"], 4)]
    ['grouped_query', 'sparse_heads', 'grouped_query', 'sparse_heads']

    Raises:
        SettingError: the list is empty or does not go into the layers a whole number of times, or an entry is
            neither a name nor a mapping with one.
    """
    given = list(value) if isinstance(value, list | tuple) else [value]
    if not given or num_layers % len(given):
        raise SettingError(
            f"a list of attentions is taken in turn by all layers, so its length must divide {num_layers}, "
            f"got {len(given)}"
        )
    return tuple(Choice.read(one, "an attention") for one in given) * (num_layers // len(given))
