"""Rows that run through one model together, with one cache: one row for each view of each branch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mixtura.errors import UnsupportedModelError
from mixtura.machine.releases import returned_cache, with_cache
from mixtura.methods.decoders import Candidate, ModelFacts, View
from mixtura.running.decoders.skipping import AfterLayer, shortened
from mixtura.running.decoders.steering import stacked
from mixtura.running.decoders.stepping import Stepping
from mixtura.running.generation import chunk_tokens, prefills_in_chunks, reserved_cache
from mixtura.types.steering import Steering


@final
@dataclass(slots=True)
class Cost:
    """What decoding took.

    Attributes:
        num_passes: forward passes of a model, each of which reads all of it but the experts once.
        num_tokens: tokens that ran, of all rows and passes, padding left out.
        num_assignments: experts that ran for a token, over all layers; 0 where routing was left alone.
        layer_passes: decoder layers that ran, over all passes.
    """

    num_passes: int = 0
    num_tokens: int = 0
    num_assignments: int = 0
    layer_passes: int = 0


@final
@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One view of one branch."""

    candidate: Candidate
    view: int

    @property
    def how(self) -> View:
        """The way its model is run."""
        return self.candidate.branch.views[self.view]

    @property
    def text(self) -> list[int]:
        """Its tokens: the prompt's and the new ones."""
        return [*self.candidate.prompt.token_ids, *self.candidate.token_ids]


@final
class Bundle:
    """Rows of one model. `read` begins them, `step` goes on by a token, `keep` forks and drops rows."""

    def __init__(
        self,
        model: PreTrainedModel,
        facts: ModelFacts,
        stepping: Stepping,
        skipped: frozenset[int],
        cost: Cost,
    ) -> None:
        self.model = model
        self.rows: list[Row] = []
        self._facts = facts
        self._stepping = stepping
        self._skipped = skipped
        self._cost = cost
        self._cache: Any = None
        self._mask = torch.ones(0, 0, dtype=torch.bool)
        self._steering: dict[int, Steering] | None = None
        takes = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in takes}

    def read(self, rows: Sequence[Row], num_more: int) -> Float[Tensor, "R V"]:
        """Read the rows' texts from their beginnings; so many tokens may follow. The last logits."""
        self.rows, self._steering = list(rows), None
        keys = [_reading(row) for row in rows]
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        unique = sorted(first.values())
        logits = self._read([rows[place] for place in unique], num_more)
        found = torch.tensor([unique.index(first[key]) for key in keys])
        if len(unique) < len(rows):
            self._select(found)
            logits = logits[found.to(logits.device)]
        return logits

    def step(
        self,
        tokens: Int[Tensor, " R"],
        awake: Bool[Tensor, " R"],
        embeddings: Float[Tensor, "R 1 D"] | None = None,
        after: AfterLayer | None = None,
    ) -> Float[Tensor, "R V"]:
        """Go on by a token in every row; what rows that are not awake are given is padding."""
        self._mask = torch.cat([self._mask, awake[:, None]], dim=1)
        if self._steering is None:
            views = [row.how for row in self.rows]
            self._steering = stacked(self._facts, views, 1, prefill=False, last=True)
        given = {"input_ids": tokens[:, None]} if embeddings is None else {"inputs_embeds": embeddings}
        with shortened(self.model, self._skipped, after) as ran:
            logits = self._forward(given, 1, self._steering, steps=not self._skipped and after is None)
        shortly = len(ran) if ran else self._facts.num_layers
        self._cost.layer_passes += shortly - self._facts.num_layers
        return logits

    def keep(self, places: Sequence[int], rows: Sequence[Row]) -> None:
        """Go on with these rows, each from where the row of that place was."""
        if list(places) != list(range(len(self.rows))):
            self._select(torch.tensor(list(places), dtype=torch.int64))
        if [row.how for row in rows] != [row.how for row in self.rows]:
            self._steering = None
        self.rows = list(rows)

    def require_pausing(self, why: str) -> None:
        """Refuse a model whose cache cannot skip a token, before any is run.

        Raises:
            UnsupportedModelError: it has states that every token changes.
        """
        if not self._keeps_tokens():
            raise UnsupportedModelError(
                f"{type(self.model).__name__} keeps states that every token changes, so its rows cannot wait "
                f"for one another, which {why} needs; choose another decoder"
            )

    def require_skipping(self, why: str) -> None:
        """Refuse a model whose layers cannot be left out for a token, before any is run.

        Raises:
            UnsupportedModelError: it has states that every token changes.
        """
        if not self._keeps_tokens():
            raise UnsupportedModelError(
                f"{type(self.model).__name__} keeps states that every token changes, for which no other "
                f"layer's can stand in, which {why} needs; choose another decoder"
            )

    def _keeps_tokens(self) -> bool:
        """Whether all that the cache keeps is keys and values of single tokens."""
        cache = reserved_cache(self.model, 1)
        layers = [] if cache is None else cache.layers
        return bool(layers) and not any(map(has_state, layers))

    def _read(self, rows: Sequence[Row], num_more: int) -> Float[Tensor, "U V"]:
        texts = [row.text for row in rows]
        width = max(map(len, texts))
        padded = torch.tensor([[0] * (width - len(text)) + text for text in texts])
        self._mask = torch.tensor([[False] * (width - len(text)) + [True] * len(text) for text in texts])
        self._cache = reserved_cache(self.model, width + num_more)
        chunks = self._cache is not None and prefills_in_chunks(self._cache)
        size = chunk_tokens(self.model) if chunks else width
        whole, views = self._mask, [row.how for row in rows]
        logits = torch.empty(0)
        for start in range(0, width, size):
            end = min(start + size, width)
            self._mask = whole[:, :end]
            steering = stacked(self._facts, views, end - start, prefill=True, last=end == width)
            logits = self._forward({"input_ids": padded[:, start:end]}, end - start, steering)
        return logits

    def _forward(
        self,
        given: dict[str, Tensor],
        columns: int,
        steering: dict[int, Steering],
        *,
        steps: bool = False,
    ) -> Float[Tensor, "R V"]:
        device = self.model.device
        options: dict[str, Any] = {name: value.to(device) for name, value in given.items()}
        options["attention_mask"] = None if bool(self._mask.all()) else self._mask.long().to(device)
        if "position_ids" in self._takes:
            places = (self._mask.long().cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = places[:, -columns:].to(device)
        if "logits_to_keep" in self._takes:
            options["logits_to_keep"] = 1

        def forward() -> Any:
            return self.model(**options, use_cache=True, return_dict=True, **with_cache(self._cache))

        stepping = self._stepping
        output = (
            stepping.step(forward, steering, len(self.rows)) if steps else stepping.read(forward, steering)
        )
        self._cache = returned_cache(output) if self._cache is None else self._cache
        self._count(columns)
        # A view of them would keep those of a whole prompt.
        logits: Tensor = output.logits[:, -1].to(copy=True, dtype=torch.float32, device="cpu")
        return logits

    def _count(self, columns: int) -> None:
        valid = self._mask[:, -columns:].reshape(-1)
        number = int(valid.sum())
        self._cost.num_passes += 1
        self._cost.num_tokens += number
        self._cost.layer_passes += self._facts.num_layers
        for layer in self._facts.layers:
            kept = self._stepping.kept.get(layer.index)
            if kept is None or len(kept) != len(valid):
                self._cost.num_assignments += number * layer.top_k
            else:
                self._cost.num_assignments += int(kept.cpu()[valid].sum())

    def _select(self, places: Int[Tensor, " R"]) -> None:
        layers = getattr(self._cache, "layers", None)
        # States are kept by rows as keys are, and beam search takes rows of them, several times or not.
        take = "reorder_cache" if any(map(has_state, layers or ())) else "batch_select_indices"
        if not layers or not all(hasattr(one, take) for one in (self._cache, *layers)):
            raise UnsupportedModelError(
                f"the cache of {type(self.model).__name__} cannot be forked; choose a decoder of one branch"
            )
        self._mask = self._mask[places]
        self._steering = None
        getattr(self._cache, take)(places.to(self.model.device))


def has_state(layer: Any) -> bool:
    """Whether a layer of a cache keeps something that every token changes, also beside keys and values."""
    return not isinstance(layer, DynamicLayer) or hasattr(layer, "update_conv_state")


def _reading(row: Row) -> tuple[Any, ...]:
    """Rows for which this is the same read their texts alike."""
    view = row.how
    steered = bool(view.steering) and view.since != "new"
    return (tuple(row.text), id(view.steering) if steered else None, view.since if steered else None)
