"""Steering the rows of a batch, each in its own way, through the seats of a model's routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.decoders import LayerFacts, ModelFacts, View
from mixtura.rerouting.core import Rerouting
from mixtura.rerouting.passes import Pass
from mixtura.types import Routing
from mixtura.types.steering import Steering


@final
class Steerer:
    """Tells each pass of a model how the routers of its rows are to be steered.

    Attributes:
        current: by decoder layer, for all tokens of the next pass.
        last: the pass that ran last.
        caught: by decoder layer, what routers returned in the last pass in `collecting`.
    """

    def __init__(self, rerouting: Rerouting) -> None:
        self._rerouting = rerouting
        self.current: Mapping[int, Steering] = {}
        self.last: Pass | None = None
        self.caught: dict[int, Any] = {}
        self._collects = False
        rerouting.listeners.append(self)

    def before(self, here: Pass) -> None:
        """Set the steering of a pass that begins."""
        here.steering.update(self.current)
        here.collecting = here.collecting or self._collects
        self.last = here

    def after(self, here: Pass, routings: Mapping[int, Routing]) -> Float[Tensor, ""] | None:
        """Keep what was collected."""
        if self._collects:
            self.caught = {
                index: (routing, here.seen[index].weights, here.seen[index].expert_ids)
                for index, routing in routings.items()
            }
        return None

    def finish_step(self) -> None:
        """Nothing to do."""

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """What routers return in passes in here is kept in `caught`, until it ends."""
        self._collects, self.caught = True, {}
        try:
            yield
        finally:
            self._collects, self.caught = False, {}

    @property
    def is_alone(self) -> bool:
        """Whether nothing else wants to know of the model's passes or changes its routing."""
        found = self._rerouting
        return found.listeners == [self] and not found.swaps and not found.balancers

    def stand_by(self) -> None:
        """Leave the model as it is, but for passes that are run in `seated`; only where it `is_alone`."""
        if self.is_alone:
            self._rerouting.pause()

    @property
    def is_standing_by(self) -> bool:
        """Whether the model is as it is, but for passes in `seated`."""
        return self._rerouting.is_paused

    def sit(self) -> None:
        """Stand by no more."""
        self._rerouting.resume()

    @contextmanager
    def seated(self, steering: Mapping[int, Steering]) -> Iterator[None]:
        """Passes in here are steered so, by the seats of the model's routers."""
        was_paused = self._rerouting.is_paused
        self._rerouting.resume()
        self.current = steering
        try:
            yield
        finally:
            self.current = {}
            if was_paused:
                self._rerouting.pause()

    def remove(self) -> None:
        """Steer no more."""
        self._rerouting.listeners.remove(self)


def stacked(
    facts: ModelFacts, views: Sequence[View], columns: int, *, prefill: bool, last: bool
) -> dict[int, Steering]:
    """One steering a layer for all tokens of a pass over rows of so many columns, row after row.

    Args:
        facts: the model's.
        views: of each row.
        columns: tokens of a row in the pass.
        prefill: the pass reads prompts.
        last: the last column is the prompts' last.
    """
    found = {}
    for layer in facts.layers:
        rows = [view.steering.get(layer.index, _NONE) for view in views]
        names = sorted({name for one in rows for name in one.given})
        if names:
            made = {name: _of_rows(name, layer, rows, views, columns, prefill, last) for name in names}
            found[layer.index] = Steering(**made)
    return found


_NONE = Steering()


def _of_rows(
    name: str,
    layer: LayerFacts,
    rows: Sequence[Steering],
    views: Sequence[View],
    columns: int,
    prefill: bool,
    last: bool,
) -> Tensor:
    """One field for every token of the pass."""
    given = [getattr(one, name) for one in rows]
    like = next(one for one in given if one is not None)
    neutral = _neutral(name, layer).to(like)
    each = torch.stack([neutral if one is None else one for one in given])
    if not prefill or all(view.since == "prompt" for view in views):
        if columns == 1:
            return each
        return each.unsqueeze(1).expand(len(rows), columns, *each.shape[1:]).flatten(0, 1)
    whole = each.unsqueeze(1).expand(len(rows), columns, *each.shape[1:]).clone()
    for place, view in enumerate(views):
        if view.since == "new":
            whole[place] = neutral
        elif view.since == "last":
            whole[place, : columns - 1 if last else columns] = neutral
    return whole.flatten(0, 1)


def _neutral(name: str, layer: LayerFacts) -> Tensor:
    """The value of a field that changes nothing, for one token."""
    experts = layer.num_experts
    values: dict[str, Tensor] = {
        "highest": torch.zeros(experts, dtype=torch.bool),
        "allowed": torch.ones(experts, dtype=torch.bool),
        "scale": torch.ones(experts),
        "mixture": torch.full((experts,), 1 / experts),
        "forced": torch.full((layer.top_k,), -1),
        "ranks": torch.tensor([0, layer.top_k]),
        "share": torch.tensor(0.0),
        "least": torch.tensor(0.0),
    }
    return values.get(name, torch.zeros(experts))


def merged(first: Mapping[int, Steering], second: Mapping[int, Steering]) -> dict[int, Steering]:
    """Both steerings at once.

    What both add to logits is added.

    Raises:
        ValueError: both say something of the same other field of a layer; the message is the field's name.
    """
    found = dict(first)
    for index, other in second.items():
        one = found.get(index, _NONE)
        both = set(one.given) & set(other.given)
        if both - {"logits"}:
            raise ValueError(min(both - {"logits"}))
        values = {item.name: getattr(one, item.name) for item in fields(one)}
        values |= {name: getattr(other, name) for name in other.given}
        if one.logits is not None and other.logits is not None:
            values["logits"] = one.logits + other.logits
        found[index] = Steering(**values)
    return found
