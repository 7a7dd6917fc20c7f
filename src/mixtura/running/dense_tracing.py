"""What text shows of dense models, layer by layer from disk: what their feed-forward parts are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.activations import ACT2FN

from mixtura.checkpoints.dense.view import GATE, UP, DenseView
from mixtura.checkpoints.upcycling.experts import read_piece
from mixtura.data.tokens import TokenBatch
from mixtura.running.stream import DEFAULT_WORKING_BYTES, Streamed
from mixtura.types.upcycling import Carry, DenseTrace, LayerInputs

_OFTEN = 10
_TOKENS = 1024
_UNBOUNDED = 1 << 62


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Text of one kind: for which source (-1 for none), and whether it is what that one is not for."""

    tokens: TokenBatch
    expert: int = -1
    negative: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be recorded; with ``words`` alone no model runs.

    ``own`` lets each source's text run through that source's feed-forward parts, with what stands outside
    them as the result will have it; else all runs through the first source.
    """

    words: bool = False
    prompts: bool = False
    own: bool = False
    products: bool = False
    activations: bool = False
    largest: bool = False
    domains: bool = False

    @property
    def inputs(self) -> bool:
        """Whether a model has to run."""
        runs = (self.prompts, self.own, self.products, self.activations, self.largest, self.domains)
        return any(runs)


def trace_dense(
    sources: Sequence[DenseView],
    carry: Carry,
    groups: Sequence[Group],
    wanted: Wanted,
    notify: Callable[[str], None] = lambda _: None,
) -> DenseTrace:
    """Run text through dense models and keep what `DenseTrace` holds; padding counts nowhere.

    Args:
        sources: the dense models.
        carry: what the result will have outside its experts.
        groups: the text; with ``wanted.own`` each for a source.
        wanted: what is to be recorded.
        notify: told how far it is.
    """
    shape = sources[0].shape
    sums = [_Sums.empty(len(groups), shape.d_model) for _ in range(shape.num_layers)]
    runs = _runs(groups, wanted.own) if wanted.inputs else []
    for source, places in runs:
        changed = _carried(sources, carry, source) if wanted.own else None
        streamed = Streamed(sources[source], changed=changed)
        recorder = _Recorder(sources[source], streamed, sums, wanted, notify)
        for place in places:
            recorder.run(groups[place], place, f"{source + 1} of {len(runs)}")
        recorder.close()
    return DenseTrace(
        layers=tuple(one.finished(wanted) for one in sums) if wanted.inputs else (),
        embeddings=_embeddings(sources[0], groups) if wanted.words else None,
        experts=tuple(group.expert for group in groups),
        negative=tuple(group.negative for group in groups),
    )


def _runs(groups: Sequence[Group], own: bool) -> list[tuple[int, list[int]]]:
    """By source that text runs through, the groups of that text."""
    if not own:
        return [(0, list(range(len(groups))))]
    experts = sorted({group.expert for group in groups})
    return [(e, [place for place, group in enumerate(groups) if group.expert == e]) for e in experts]


def _carried(sources: Sequence[DenseView], carry: Carry, source: int) -> Callable[[str, Tensor], Tensor]:
    """Replaces a source's tensors outside the feed-forward parts by those that the result will have."""

    view = sources[source]
    parameters = {view.sources[name].names[0]: name for name in view.sources}

    def changed(name: str, value: Tensor) -> Tensor:
        if ".mlp." in name or (carry.sources, carry.weights) == ((source,), (1.0,)):
            return value
        total = torch.zeros(value.shape)
        for number, weight in zip(carry.sources, carry.weights, strict=True):
            total += weight * sources[number].parameter(parameters[name]).float()
        return total.to(value.dtype)

    return changed


def _embeddings(view: DenseView, groups: Sequence[Group]) -> Float[Tensor, "G D"]:
    """The mean embedding of each group's tokens; only rows of the words that occur are read."""
    table = view.pieces["model.embed_tokens.weight"]
    made = []
    for group in groups:
        ids = group.tokens.input_ids[group.tokens.attention_mask.bool()]
        words, counts = ids.unique(return_counts=True)
        rows = torch.cat([read_piece(table, int(word), int(word) + 1).float() for word in words])
        made.append((rows * counts[:, None]).sum(0) / counts.sum())
    return torch.stack(made)


def _unit_neurons(view: DenseView, layer: int) -> Callable[[Tensor], Tensor]:
    """The activations of a layer's neurons, whose rows of gate and up are made of length one."""
    gate, up = (
        torch.nn.functional.normalize(read_piece(view.layer_piece(layer, name)).float(), dim=-1)
        for name in (GATE, UP)
    )
    curve = ACT2FN[view.traits.activation]
    return lambda rows: curve(rows @ gate.T) * (rows @ up.T)


@final
@dataclass(slots=True)
class _Sums:
    """What is added up of one layer."""

    means: Float[Tensor, "G D"]
    lasts: Float[Tensor, "G D"]
    sequences: Int[Tensor, " G"]
    counts: Int[Tensor, " G"]
    products: Tensor | None = None
    targets: Tensor | None = None
    activations: Tensor | None = None
    often: Tensor | None = None
    largest: list[Int[Tensor, "T J"]] = field(default_factory=list)
    domains: Tensor | None = None

    @staticmethod
    def empty(num_groups: int, d_model: int) -> _Sums:
        means, lasts = (torch.zeros(num_groups, d_model, dtype=torch.float64) for _ in range(2))
        sequences, counts = (torch.zeros(num_groups, dtype=torch.int64) for _ in range(2))
        return _Sums(means, lasts, sequences, counts)

    def add(self, inputs: Float[Tensor, "S T D"], valid: Bool[Tensor, "S T"], place: int) -> None:
        """Inputs of a batch; padding stands on the right."""
        lengths = valid.sum(1)
        summed = (inputs.float() * valid[..., None]).sum(1)
        self.means[place] += (summed / lengths[:, None]).sum(0).double()
        last = inputs[torch.arange(len(inputs)), lengths - 1].float()
        self.lasts[place] += last.sum(0).double()
        self.sequences[place] += len(inputs)
        self.counts[place] += int(lengths.sum())

    def add_products(self, inputs: Float[Tensor, "S T D"], valid: Bool[Tensor, "S T"], place: int) -> None:
        """Products of all tokens' inputs, with a one beside each."""
        rows = inputs[valid].float()
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        if self.products is None or self.targets is None:
            width = rows.shape[1]
            self.products, self.targets = torch.zeros(width, width), torch.zeros(width, len(self.means))
        self.products += rows.T @ rows
        self.targets[:, place] += rows.sum(0)

    def add_domain(self, hidden: Float[Tensor, "S T F"], valid: Bool[Tensor, "S T"], place: int) -> None:
        """What the down projection is given, for the domain that this text is."""
        rows = hidden[valid].float().abs()
        if self.domains is None:
            self.domains = torch.zeros(len(self.means), rows.shape[1])
        self.domains[place] += rows.sum(0)

    def add_activations(self, hidden: Float[Tensor, "S T F"], valid: Bool[Tensor, "S T"]) -> None:
        """What the down projection is given."""
        rows = hidden[valid].float().abs()
        if self.activations is None or self.often is None:
            self.activations, self.often = torch.zeros(rows.shape[1]), torch.zeros(rows.shape[1])
        self.activations += rows.sum(0)
        largest = rows.topk(min(_OFTEN, rows.shape[1]), dim=1).indices
        self.often += torch.bincount(largest.reshape(-1), minlength=rows.shape[1]).float()

    def add_largest(
        self, inputs: Float[Tensor, "S T D"], valid: Bool[Tensor, "S T"], neurons: Callable[[Tensor], Tensor]
    ) -> None:
        """Each token's neurons of largest activation, a few tokens at a time."""
        for rows in inputs[valid].float().split(_TOKENS):
            hidden = neurons(torch.nn.functional.normalize(rows, dim=-1)).abs()
            self.largest.append(hidden.topk(min(_OFTEN, hidden.shape[1]), dim=1).indices.int())

    def finished(self, wanted: Wanted) -> LayerInputs:
        """Sums made into means."""
        each, total = self.sequences.clamp(min=1)[:, None], max(int(self.counts.sum()), 1)
        return LayerInputs(
            means=(self.means / each).float(),
            lasts=(self.lasts / each).float(),
            counts=self.counts,
            products=self.products if wanted.products else None,
            targets=self.targets if wanted.products else None,
            activations=None if self.activations is None else self.activations / total,
            often=None if self.often is None else self.often / total,
            largest=torch.cat(self.largest) if self.largest else None,
            domains=None if self.domains is None else self.domains / self.counts.clamp(min=1)[:, None],
        )


@final
class _Recorder:
    """Hooks on the feed-forward parts of a streamed dense model."""

    def __init__(
        self,
        view: DenseView,
        streamed: Streamed,
        sums: list[_Sums],
        wanted: Wanted,
        notify: Callable[[str], None],
    ) -> None:
        self._streamed, self._sums, self._wanted, self._notify = streamed, sums, wanted, notify
        self._view = view
        self._valid: Tensor = torch.ones(1, 1, dtype=torch.bool)
        self._place, self._what, self._adds = 0, "", True
        self._handles: list[Any] = []
        for number, block in enumerate(streamed.blocks):
            part: Any = block.get_submodule("mlp")
            self._handles.append(part.register_forward_pre_hook(self._entering(number)))
            if wanted.activations or wanted.domains:
                down = part.down_proj
                self._handles.append(down.register_forward_pre_hook(self._before_down(number)))

    def run(self, group: Group, place: int, what: str) -> None:
        """Run a group's text and add what is seen."""
        self._place, self._what, self._adds = place, what, not group.negative
        ids, mask = group.tokens.input_ids, group.tokens.attention_mask
        for rows in self._streamed.batches(*ids.shape, max_bytes=DEFAULT_WORKING_BYTES):
            self._valid = mask[rows].bool()
            self._streamed.hidden(ids[rows], mask[rows], max_bytes=_UNBOUNDED)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _entering(self, number: int) -> Callable[..., None]:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            self._notify(f"model {self._what}, text {self._place + 1}, layer {number + 1}")
            self._sums[number].add(given[0], self._valid, self._place)
            # What a model is not for is of no domain.
            if self._wanted.products and self._adds:
                self._sums[number].add_products(given[0], self._valid, self._place)
            if self._wanted.largest:
                self._sums[number].add_largest(given[0], self._valid, _unit_neurons(self._view, number))

        return hook

    def _before_down(self, number: int) -> Callable[..., None]:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            if self._wanted.activations:
                self._sums[number].add_activations(given[0], self._valid)
            if self._wanted.domains:
                self._sums[number].add_domain(given[0], self._valid, self._place)

        return hook
