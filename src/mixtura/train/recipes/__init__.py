"""Published models as configurations of `mixtura train`: their sizes, and a tiny one that trains here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final, get_args

from mixtura.errors import SettingError, UnknownNameError, UserError
from mixtura.methods.settings import fits

_FOLDER = Path(__file__).parent
Scale = Literal["published", "tiny"]
_TOLERANCE = 0.02


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A published model.

    Attributes:
        name: of the file.
        paper: id in the project's list of papers.
        title: of its paper.
        source: where its sizes are from, and which are not.
        total, active: parameters as published; None where that was not found.
        values: its configuration at the published size.
        tiny: what is different at a size that trains on two cores in a minute.
    """

    name: str
    paper: int
    title: str
    source: str
    total: float | None
    active: float | None
    values: Mapping[str, Any]
    tiny: Mapping[str, Any]

    def at(self, scale: str) -> dict[str, Any]:
        """The configuration at a scale, as plain values.

        Raises:
            UnknownNameError: there is no such scale.
        """
        if scale not in get_args(Scale):
            raise UnknownNameError("scale of a recipe", scale, get_args(Scale))
        return merged(self.values, self.tiny if scale == "tiny" else {})

    def misses(self, name: str, counted: int | None) -> str | None:
        """What is wrong with a count beside the published one; None where it is within 2 %, or unknown."""
        wanted = getattr(self, name)
        if wanted is None or (counted is not None and abs(counted / wanted - 1) <= _TOLERANCE):
            return None
        return f"{self.name} has {counted} {name} parameters, published are {wanted:g}"


def names() -> tuple[str, ...]:
    """The recipes there are."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UnknownNameError: there is none of that name.
        SettingError: its file lacks something.
    """
    from mixtura.train.config import read_yaml

    if name not in names():
        raise UnknownNameError("recipe", name, names())
    values = read_yaml(_FOLDER / f"{name}.yaml")
    about = values.pop("about", None)
    tiny = values.pop("tiny", {})
    wanted = {"paper": int, "title": str, "source": str}
    if not isinstance(about, Mapping) or not all(fits(about.get(key), kind) for key, kind in wanted.items()):
        raise SettingError(f"the recipe {name} needs about: with paper, title and source")
    published = about.get("published", {})
    return Recipe(
        name=name,
        paper=about["paper"],
        title=about["title"],
        source=about["source"],
        total=published.get("total"),
        active=published.get("active"),
        values=values,
        tiny=tiny,
    )


def read_recipe(name: str, scale: str, changes: Sequence[str] = ()) -> Any:
    """The configuration of a recipe at a scale, with ``key=value`` changes made to it.

    Raises:
        UserError: as `mixtura.train.config.read_config`; or the model and what training it takes do not fit
            into memory.
    """
    from mixtura.train.config import build_config, changed

    found = recipe(name)
    return build_config(changed(found.at(scale), changes))


def require_memory(config: Any, num_bytes: int, name: str) -> None:
    """Refuse a model whose weights, gradients and moments in float32 are more than ``num_bytes``.

    Raises:
        UserError: they are.
    """
    from mixtura.modeling.config import MixturaConfig
    from mixtura.modeling.counting import count
    from mixtura.report import human_count
    from mixtura.report.units import format_bytes

    counted = count(MixturaConfig(**config.model))
    if 16 * counted.total > num_bytes:
        raise UserError(
            f"the recipe {name} has {human_count(counted.total)} parameters, which take "
            f"{format_bytes(16 * counted.total)} to train, and {format_bytes(num_bytes)} are free; add "
            "--scale tiny, or make it smaller with --set"
        )


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others in their place; mappings are merged key by key, and null takes a key away."""
    made = copy.deepcopy(dict(values))
    for key, value in changes.items():
        below = made.get(key)
        if value is None:
            made.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(below, Mapping):
            made[key] = merged(below, value)
        else:
            made[key] = copy.deepcopy(value)
    return made
