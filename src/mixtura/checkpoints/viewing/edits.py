"""What dropping experts does to each stored tensor of a checkpoint: gone, renumbered or cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from mixtura.checkpoints.viewing.droppable import cut
from mixtura.checkpoints.viewing.formats import StoredTensor
from mixtura.checkpoints.viewing.mapping import EXPERT_NUMBER, Source
from mixtura.checkpoints.viewing.probe import CountField
from mixtura.checkpoints.viewing.records import Site
from mixtura.errors import UserError

Kept = Mapping[int, Sequence[int]]


@final
@dataclass(frozen=True, slots=True)
class TensorEdit:
    """The fate of one stored tensor: its new name (`None`: it goes) and what cuts it (`None`: whole)."""

    name: str | None
    cut: Callable[[Tensor], Tensor] | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor as it must be written. Works on the meta device too, to learn the new shape."""
        return tensor if self.cut is None else self.cut(tensor).contiguous()


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """Cuts one axis: the entries of ``kept`` experts, and all beyond the first ``num_experts``."""

    kept: tuple[int, ...]
    num_experts: int
    axis: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The entries that stay."""
        return cut(tensor, self.axis, self.kept, self.num_experts)


@final
class Converted:
    """Cuts a stored tensor that becomes several parameters or is turned round on the way.

    It is converted, each parameter is cut along its own axis, and the result is converted back.
    """

    def __init__(self, source: Source, cuts: Mapping[str, Rows], config: Any) -> None:
        self._source = source
        self._cuts = cuts
        self._config = config

    def __call__(self, tensor: Tensor) -> Tensor:
        """The stored tensor without the dropped experts."""
        (pattern,) = self._source.parts
        made = self._source.convert({pattern: [tensor]}, None, self._config)
        smaller = {
            name: self._cuts[name](part) if name in self._cuts else part for name, part in made.items()
        }
        back = self._source.converter.reverse_transform()
        for position, target in enumerate(self._source.targets):
            back.collected_tensors[back.source_patterns[position]].append(smaller[target])
        with torch.no_grad():
            (result,) = back.convert(self._source.names[0], model=None, config=self._config).values()
        whole = result[0] if isinstance(result, list) else result
        assert isinstance(whole, Tensor)
        return whole


def tensor_edits(
    sites: Sequence[Site],
    sources: Mapping[str, Source],
    stored: Mapping[str, StoredTensor],
    kept: Kept,
    config: Any,
) -> dict[str, TensorEdit]:
    """The edits of every stored tensor that changes; those not named stay as they are."""
    edits: dict[str, TensorEdit] = {}
    converted: dict[str, tuple[Source, dict[str, Rows]]] = {}
    for site in sites:
        staying = tuple(kept[site.index])
        if len(staying) == site.shape.num_experts:
            continue
        for parameter in site.layout.parameters:
            source = sources[f"{site.name}.{parameter}"]
            edits.update(_expert_edits(site, f"{site.name}.{parameter}", source, stored, sites, kept))
        for name, axis in site.expert_axes.items():
            if name not in sources:
                continue
            source, rows = sources[name], Rows(staying, site.shape.num_experts, axis)
            if source.converter is None:
                edits[source.names[0]] = TensorEdit(source.names[0], rows)
            else:
                converted.setdefault(source.names[0], (source, {}))[1][name] = rows
    for name, (source, cuts) in converted.items():
        edits[name] = TensorEdit(name, Converted(source, cuts, config))
    return edits


def _expert_edits(
    site: Site,
    parameter: str,
    source: Source,
    stored: Mapping[str, StoredTensor],
    sites: Sequence[Site],
    kept: Kept,
) -> dict[str, TensorEdit]:
    staying = tuple(kept[site.index])
    places = {expert: place for place, expert in enumerate(staying)}
    first = _experts_before(source, parameter, sites, kept)
    edits: dict[str, TensorEdit] = {}
    for pattern, names in source.own_parts(parameter).items():
        for expert, name in enumerate(names):
            for part in stored[name].parts:
                if "*" not in pattern:
                    edits[part] = TensorEdit(part, Rows(staying, site.shape.num_experts))
                elif expert in places:
                    number = str(first + places[expert])
                    edits[part] = TensorEdit(EXPERT_NUMBER.sub(number, part, count=1))
                else:
                    edits[part] = TensorEdit(None)
    return edits


def _experts_before(source: Source, parameter: str, sites: Sequence[Site], kept: Kept) -> int:
    """Experts that stay in layers whose experts come first in the same list on disk."""
    total = 0
    for other in source.targets[: source.targets.index(parameter)]:
        site = next(site for site in sites if f"{site.name}." == other[: len(site.name) + 1])
        total += len(kept[site.index])
    return total


def renumbered(name: str, num_experts: int, kept: Sequence[int]) -> str:
    """A name of one expert that stays with its number after a drop.

    Two layers may share one list of names (experts for text first, for images after); the second one's
    then start where the first one's end.
    """
    match = EXPERT_NUMBER.search(name)
    assert match is not None
    share, expert = divmod(int(match.group()), num_experts)
    number = share * len(kept) + list(kept).index(expert)
    return f"{name[: match.start()]}{number}{name[match.end() :]}"


def pruned_config(
    raw: dict[str, Any], config: Any, sites: Sequence[Site], fields: Mapping[str, CountField], kept: Kept
) -> dict[str, Any]:
    """``config.json`` with the new number of experts.

    Raises `UserError` where layers counted by one field would keep different numbers.
    """
    changed = copy.deepcopy(raw)
    for field in set(fields.values()):
        counts = {len(kept[site.index]) for site in sites if fields[site.stack] == field}
        if len(counts) > 1:
            raise UserError(
                f"the layers would keep {min(counts)} to {max(counts)} experts, but config.json has one "
                f"number ({field.path[-1]}); drop as many in every layer"
            )
        (count,) = counts
        _write(changed, config, field, count)
    return changed


def _write(raw: dict[str, Any], config: Any, field: CountField, count: int) -> None:
    owner, held = raw, config
    for part in field.path[:-1]:
        owner, held = owner.setdefault(part, {}), getattr(held, part)
    name = field.path[-1]
    # The file may use any of the names that the config class takes for the same number.
    aliases = {alias for alias, real in type(held).attribute_map.items() if real == name}
    present = [key for key in (name, *sorted(aliases)) if key in owner] or [name]
    owner.update(dict.fromkeys(present, count))
