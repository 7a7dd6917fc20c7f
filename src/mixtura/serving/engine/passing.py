"""Passes of the model: prompts in parts, and one step of several texts together where that gives the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from mixtura.kernels.several import SideBySide
from mixtura.machine.releases import returned_cache, with_cache
from mixtura.running.generation import (
    ReservedLayer,
    chunk_tokens,
    prefills_in_chunks,
    reserved_cache,
    spread_ids,
)
from mixtura.serving.engine.caches import shorten
from mixtura.serving.engine.deciding import Steers
from mixtura.serving.engine.lanes import PROMPT_LOGITS, Lane
from mixtura.serving.engine.records import Adapters, Asked

_Made = TypeVar("_Made")
# Texts that run together: what the compiled step takes.
MOST_TOGETHER: Final = 64
# Lengths of the texts that are tried, and by how much logits of a step may differ from those alone.
_TRIED: Final = (5, 9, 3)
_TOLERANCES: Final = {torch.float32: 1e-4}
_TOLERANCE: Final = 3e-2


@final
class Passes:
    """Runs texts through a model, each with a cache of its own.

    Whether several texts can take a step in one pass is tried once, on texts of different lengths beside the
    same texts alone; a family for which that gives something else, or whose cache cannot be laid side by
    side, takes its steps one text after the other.

    Args:
        model: a causal language model.
        steers: runs passes in the ways of texts' decoders.
        adapters: on it, of which texts choose.

    Attributes:
        steers: as given.
        together: whether steps of several texts are one pass.
        mixes: whether texts with different adapters are.
    """

    def __init__(self, model: PreTrainedModel, steers: Steers, adapters: Adapters | None = None) -> None:
        self.model = model
        self.steers = steers
        self._adapters = adapters
        self.chunk_tokens = chunk_tokens(model)
        self.together = self._try((None,))
        names = () if adapters is None else adapters.names
        self.mixes = self.together and adapters is not None and adapters.mixes and self._try((None, *names))

    def read(self, lane: Lane) -> Float[Tensor, "T V"]:
        """Read the next part of a text's prompt in one way; returns the logits behind what is asked of it.

        Raises:
            CheckpointError: an expert cannot be read; the lane has not changed.
        """
        keeps_all = lane.asked.reads_prompt
        size = PROMPT_LOGITS if keeps_all else self.chunk_tokens
        if lane.cache is None or not prefills_in_chunks(lane.cache):
            size = lane.num_prompt
        end = min(lane.num_read + size, lane.num_prompt)
        ids = torch.tensor([lane.ids[lane.num_read : end]])
        keep = 0 if keeps_all else 1
        num, is_last = ids.shape[1], end == lane.num_prompt
        logits = self._changing(
            [lane],
            lambda: self.steers.read(lambda: self._pass(lane, ids, keep), lane, num, is_last=is_last),
        )
        lane.num_read = end
        return logits

    def step(self, rows: Sequence[Lane]) -> list[Float[Tensor, " V"]]:
        """One token of each row; returns the logits behind it.

        Raises:
            CheckpointError: an expert cannot be read; no row has changed.
        """
        if len(rows) > 1 and self.together and self._fit(rows):
            logits = self._changing(rows, lambda: self.steers.step(lambda: self._step_together(rows), rows))
        else:
            logits = [self._step_alone(row) for row in rows]
        for row in rows:
            row.num_read += 1
        return logits

    def _step_alone(self, row: Lane) -> Float[Tensor, " V"]:
        ids = torch.tensor([row.ids[-1:]])
        made = self._changing([row], lambda: self.steers.step(lambda: self._pass(row, ids, 1), [row]))
        return made[-1]

    def _changing(self, rows: Sequence[Lane], run: Callable[[], _Made]) -> _Made:
        """Run a pass; where it fails, caches are as they were."""
        try:
            return run()
        except Exception:
            self._take_back(rows)
            raise

    def parts(self, rows: Sequence[Lane]) -> list[list[Lane]]:
        """The rows of a step by which of them go together."""
        if not self.together:
            return [[row] for row in rows]
        fit = [row for row in rows if not row.view.skipped and self._fit([row])]
        made = [
            own[first : first + MOST_TOGETHER]
            for own in self._apart(fit)
            for first in range(0, len(own), MOST_TOGETHER)
        ]
        return made + [[row] for row in rows if row not in fit]

    def _apart(self, rows: Sequence[Lane]) -> list[list[Lane]]:
        """Lanes by their adapter, where these do not mix."""
        if self.mixes:
            return [[*rows]]
        by_name: dict[str | None, list[Lane]] = {}
        for row in rows:
            by_name.setdefault(row.asked.adapter, []).append(row)
        return [*by_name.values()]

    def _pass(self, row: Lane, ids: Int[Tensor, "1 T"], keep: int) -> Float[Tensor, "K V"]:
        cache = row.cache
        self._choose([row])
        outputs = self._forward(ids, cache, keep)
        if cache is None:
            row.cache = returned_cache(outputs)
        return outputs.logits[0]  # type: ignore[no-any-return]

    def _forward(self, ids: Int[Tensor, "S T"], cache: Any, keep: int, **more: Any) -> Any:
        model: Any = self.model
        with torch.no_grad():
            return model(
                input_ids=ids.to(model.device),
                use_cache=True,
                logits_to_keep=keep,
                **more,
                **with_cache(cache),
            )

    def _step_together(self, rows: Sequence[Lane]) -> list[Float[Tensor, " V"]]:
        ids = torch.tensor([[row.ids[-1]] for row in rows])
        cache = SideBySide([row.cache for row in rows])
        device = self.model.device
        self._choose(rows)
        seen = {"attention_mask": cache.mask().to(device), "position_ids": cache.places().to(device)}
        outputs = self._forward(ids, cache, 1, **seen)
        return list(outputs.logits[:, -1])

    def _choose(self, rows: Sequence[Lane]) -> None:
        if self._adapters is not None:
            self._adapters.choose([row.asked.adapter for row in rows])

    def _take_back(self, rows: Sequence[Lane]) -> None:
        """After a pass that failed: caches as they were, or none where they cannot be."""
        for row in rows:
            if row.cache is not None and self._can_gather(row.cache):
                shorten(row.cache, row.num_read)
            else:
                row.cache = None

    def _fit(self, rows: Sequence[Lane]) -> bool:
        """Whether no layer of the rows has let go of a token, so that one mask is right for all layers."""
        longest = max(row.num_read for row in rows) + 1
        windows = [
            layer.sliding_window
            for row in rows
            for layer in row.cache.layers
            if type(layer) is DynamicSlidingWindowLayer
        ]
        return not windows or longest < min(windows)

    @staticmethod
    def _can_gather(cache: Any) -> bool:
        layers = getattr(cache, "layers", None) or ()
        return bool(layers) and all(
            isinstance(layer, ReservedLayer) or type(layer) is DynamicSlidingWindowLayer for layer in layers
        )

    def _try(self, adapters: Sequence[str | None]) -> bool:
        """Whether a step of several texts, with these adapters in turn, gives what each gives alone."""
        if reserved_cache(self.model, 1) is None:
            return False
        alone, together = self._tried_rows(adapters), self._tried_rows(adapters)
        if not all(self._can_gather(row.cache) and self._fit([row]) for row in together):
            return False
        try:
            found = self._step_together(together)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            # A family that does more with a cache than asking it for all keys and values.
            return False
        expected = [self._pass(row, torch.tensor([row.ids[-1:]]), 1)[-1] for row in alone]
        return all(_are_alike(one, other) for one, other in zip(found, expected, strict=True))

    def _tried_rows(self, adapters: Sequence[str | None]) -> list[Lane]:
        rows = []
        for place in range(max(len(_TRIED), len(adapters))):
            length = _TRIED[place % len(_TRIED)]
            ids = spread_ids(self.model, length + 1).roll(length).tolist()
            asked = Asked(prompt=tuple(ids), max_new_tokens=1, adapter=adapters[place % len(adapters)])
            row = Lane(asked, ids[:-1])
            row.cache = reserved_cache(self.model, length + 1)
            self._pass(row, torch.tensor([row.ids]), 1)
            row.num_read = length
            rows.append(row)
        return rows


def _are_alike(one: Float[Tensor, " V"], other: Float[Tensor, " V"]) -> bool:
    tolerance = _TOLERANCES.get(other.dtype, _TOLERANCE)
    difference = float((one.float() - other.float()).norm())
    return difference <= tolerance * float(other.float().norm())
