"""Which stored tensors make up which parameter, by transformers' own conversion rules.

Checkpoints name and cut tensors in their own ways: one matrix per expert, gate and up apart, fused,
transposed, interleaved. transformers declares for each family how they become its parameters; the
same declarations are used here, one expert at a time.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import WeightConverter

from mixtura.errors import CheckpointError

EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@final
@dataclass(slots=True)
class Source:
    """Where one or more parameters come from.

    ``parts`` maps each source pattern to the stored names it matched, in order: one, or one per
    expert. ``targets`` are the parameters made of them, ``converter`` the rule that makes them
    (`None`: stored as it is).
    """

    targets: tuple[str, ...]
    converter: Any = None
    parts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def per_expert(self) -> bool:
        """Whether each expert has stored tensors of its own."""
        return any("*" in pattern for pattern in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Every stored name, in order."""
        return tuple(name for names in self.parts.values() for name in names)

    def expert_names(self, expert: int, num_experts: int) -> dict[str, list[str]]:
        """The stored names of one expert by pattern; a fused tensor appears for every expert.

        Where one list of stored experts is divided over several parameters (experts for text, then
        experts for images) the names of all of them are given.
        """
        return {
            pattern: names[expert::num_experts] if "*" in pattern else names
            for pattern, names in self.parts.items()
        }

    def renamed(self, old: str, new: str) -> Source:
        """The same source for a parameter that is tied to one of its targets."""
        targets = tuple(new if target == old else target for target in self.targets)
        return Source(targets, self.converter, self.parts)

    def own_parts(self, target: str) -> dict[str, list[str]]:
        """The stored names by pattern that make ``target`` where several parameters share one list."""
        share, shares = self.targets.index(target), len(self.targets)
        own: dict[str, list[str]] = {}
        for pattern, names in self.parts.items():
            length = len(names) // shares
            own[pattern] = names[share * length : (share + 1) * length] if "*" in pattern else names
        return own

    def convert(self, tensors: dict[str, list[Tensor]], model: Any, config: Any) -> dict[str, Tensor]:
        """The parameters that stored tensors (by pattern) become."""
        if self.converter is None:
            (name,) = self.targets
            ((value,),) = tensors.values()
            return {name: value}
        converter = copy.deepcopy(self.converter)
        for pattern, values in tensors.items():
            converter.collected_tensors[pattern].extend(values)
        with torch.no_grad():
            made = converter.convert(self.targets[0], model=model, config=config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@final
class ShapeModel:
    """Stands in for a model where a conversion rule asks for the shape of a parameter."""

    def __init__(self, shapes: Callable[[str], tuple[int, ...]]) -> None:
        self._shapes = shapes

    def get_parameter(self, name: str) -> Tensor:
        """A tensor without storage of the shape that the parameter must get."""
        return torch.empty(self._shapes(name), device="meta")


def map_sources(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, Source], tuple[str, ...]]:
    """Sources by parameter name, and the stored names that belong to no parameter.

    ``model`` may be on the meta device. Names that differ only in an expert's number are resolved
    once, so that a checkpoint with tens of thousands of them is mapped in a fraction of a second.
    """
    resolver = _Resolver(model)
    groups = _group_by_expert(names)
    # transformers resolves names in this order, and a few of its rules depend on it.
    for example in sorted(groups, key=core_model_loading.dot_natural_key):
        target, pattern = resolver.resolve(example)
        if len(groups[example]) == 1 or (pattern is not None and "*" in pattern):
            resolver.add(target, pattern, groups[example])
        else:
            for name in groups[example]:
                resolver.add(*resolver.resolve(name), [name])
    for source in resolver.sources.values():
        if source.converter is not None:
            order = [pattern for pattern in source.converter.source_patterns if pattern in source.parts]
            source.parts = {pattern: source.parts[pattern] for pattern in order}
    return resolver.sources, tuple(resolver.unused)


def leads_to_parameter(model: nn.Module, name: str) -> bool:
    """Whether a tensor of this name on disk would be part of a parameter of the model."""
    resolver = _Resolver(model)
    return resolver.has(resolver.resolve(name)[0])


def add_tied(sources: dict[str, Source], model: Any) -> None:
    """Give tied parameters, which are stored once under either name, the source of the one that is there."""
    tied = dict(model.all_tied_weights_keys)
    for name, kept in [*tied.items(), *((kept, name) for name, kept in tied.items())]:
        if name not in sources and kept in sources:
            sources[name] = sources[kept].renamed(kept, name)


@final
class _Resolver:
    """Applies transformers' rules to stored names and collects what they become."""

    def __init__(self, model: nn.Module) -> None:
        transforms = conversion_mapping.get_model_conversion_mapping(model)
        self._converters = [item for item in transforms if isinstance(item, WeightConverter)]
        self._renamings = [item for item in transforms if not isinstance(item, WeightConverter)]
        self._by_pattern = {pattern: item for item in self._converters for pattern in item.source_patterns}
        self._parameters = model.state_dict()
        self._prefix = str(model.base_model_prefix)
        self.sources: dict[str, Source] = {}
        self.unused: list[str] = []

    def resolve(self, name: str) -> tuple[str, str | None]:
        """The parameter a stored name leads to and the pattern of the rule that cuts or joins it."""
        rename = core_model_loading.rename_source_key
        target, pattern = rename(name, self._renamings, self._converters, self._prefix, self._parameters)
        if target not in self._parameters and name in self._parameters:
            target, pattern = rename(name, [], [], self._prefix, self._parameters)
        return target, pattern

    def has(self, target: str) -> bool:
        """Whether the model has a parameter of this name."""
        return target in self._parameters

    def add(self, target: str, pattern: str | None, names: list[str]) -> None:
        """Record that ``names`` are a part of ``target``."""
        if target not in self._parameters:
            self.unused.extend(names)
            return
        converter = self._by_pattern[pattern] if pattern is not None else None
        source = self.sources.get(target)
        if source is not None and converter is None:
            raise CheckpointError(
                f"the checkpoint holds {target} twice, as {source.names[0]} and as {names[0]}, and nothing "
                "says which one is meant; write it again without one of them"
            )
        if source is None:
            source = Source(_targets(target, converter), converter)
            self.sources.update(dict.fromkeys(source.targets, source))
        source.parts.setdefault(pattern or names[0], []).extend(names)


def _group_by_expert(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ only in an expert's number, under the first of them, in order of the number."""
    found: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in names:
        match = EXPERT_NUMBER.search(name)
        if match is None:
            found[name].append((0, name))
        else:
            found[f"{name[: match.start()]}*{name[match.end() :]}"].append((int(match.group()), name))
    groups = (sorted(items) for items in found.values())
    return {items[0][1]: [name for _, name in items] for items in groups}


def _targets(first: str, converter: Any) -> tuple[str, ...]:
    """All parameters a rule makes, given the name of the first."""
    if converter is None or len(converter.target_patterns) == 1:
        return (first,)
    patterns = converter.target_patterns
    return tuple(first.replace(patterns[0], pattern, 1) for pattern in patterns)
