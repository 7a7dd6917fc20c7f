"""Passes of a model whose routers are steered: in one compiled call where that can be, else by seats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar, final
from weakref import WeakSet

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.kernels.paths import paths_of
from mixtura.kernels.step_stack import has_stack
from mixtura.kernels.step_steering import (
    Sizes,
    SteeredStep,
    UnsteeredError,
    steered_step,
    steering_steps,
)
from mixtura.methods.decoders import ModelFacts
from mixtura.running.decoders.steering import Steerer
from mixtura.types.steering import Steering

_Made = TypeVar("_Made")
# Models that were run for a few tokens, so that it is known how they run steps.
_tried: WeakSet[nn.Module] = WeakSet()


@final
class Stepping:
    """Runs a model's passes, each steered in its way.

    Seats stand in for routers only while a pass needs them, so that every other runs as it does without.

    Args:
        model: in evaluation mode.
        facts: what is known of it.
        steerer: of its seats; None where nothing is steered.

    Attributes:
        kept: by decoder layer, how many experts each token of the last pass had; only where some may have
            been left out.
    """

    def __init__(self, model: PreTrainedModel, facts: ModelFacts, steerer: Steerer | None) -> None:
        self.kept: Mapping[int, Int[Tensor, " T"]] = {}
        self._model = model
        self._steerer = steerer
        self._sizes = {one.index: Sizes(one.num_experts, one.top_k) for one in facts.layers}
        self._made: tuple[Mapping[int, Steering], int, SteeredStep | None] | None = None
        # Whether seats stay where they are, because a step would not run in a compiled call.
        self._stays = False
        self._is_whole = steerer is not None and steerer.is_alone and has_stack(model)
        if self._is_whole and steerer is not None:
            _try(model)
            steerer.stand_by()

    def read(self, forward: Callable[[], _Made], steering: Mapping[int, Steering]) -> _Made:
        """A pass over parts of texts; ``forward`` runs the model."""
        if self._steerer is not None and self._stays:
            self._stays = False
            self._steerer.stand_by()
        return self._by_seats(forward, steering)

    def step(self, forward: Callable[[], _Made], steering: Mapping[int, Steering], num_tokens: int) -> _Made:
        """A pass over a token of each of some texts."""
        if self._steerer is None or self._stays or not self._is_whole:
            return self._by_seats(forward, steering)
        step = self._compiled(steering, num_tokens)
        if step is None:
            return self._by_seats(forward, steering)
        try:
            with steering_steps(step):
                made = forward()
        except UnsteeredError:
            # Putting seats in and out for every token would cost more than it saves.
            self._stays = True
            self._steerer.sit()
            return self._by_seats(forward, steering)
        self.kept = step.kept
        return made

    def _by_seats(self, forward: Callable[[], _Made], steering: Mapping[int, Steering]) -> _Made:
        steerer = self._steerer
        if steerer is None or (not steering and steerer.is_standing_by):
            self.kept = {}
            return forward()
        if not self._is_whole:
            steerer.sit()
        with steerer.seated(steering):
            made = forward()
        self.kept = {} if steerer.last is None else steerer.last.kept
        return made

    def _compiled(self, steering: Mapping[int, Steering], num_tokens: int) -> SteeredStep | None:
        known = self._made
        if known is None or known[0] is not steering or known[1] != num_tokens:
            step = steered_step(steering, self._sizes, num_tokens) if steering else None
            known = self._made = (steering, num_tokens, step)
        return known[2]


def _try(model: PreTrainedModel) -> None:
    """Let a model find out how it runs steps, which it cannot while something stands in for its routers."""
    if model in _tried:
        return
    _tried.add(model)
    if any(one.path != "whole step" for one in paths_of(model, probe=False)):
        paths_of(model)
