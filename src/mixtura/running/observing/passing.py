"""The pass itself: batches through the model with a recorder on every MoE layer."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from mixtura.checkpoints.view import DiskLayer, LayerView, MemoryView, open_model
from mixtura.checkpoints.viewing.packed import PackedLayer
from mixtura.checkpoints.viewing.wrappers import plain_model, submodule
from mixtura.data.tokens import TokenBatch
from mixtura.errors import UserError
from mixtura.kernels import AssignmentObserver
from mixtura.methods import create, header
from mixtura.report.screen import screen
from mixtura.running.observing.attach import Several, attached
from mixtura.running.observing.catching import Caught, catching
from mixtura.running.observing.recorder import Cursor, LayerRecorder, caught_for
from mixtura.types.trace import Trace

Observers = Callable[[LayerView], AssignmentObserver | None]

DEFAULT_BATCH_TOKENS = 2048


def observe_model(
    model: nn.Module | MemoryView,
    tokens: TokenBatch,
    *,
    statistics: Sequence[str] = (),
    features: Sequence[str] = (),
    keep_choices: bool = False,
    keep_logits: int = 0,
    batch_tokens: int | None = None,
    progress: bool = True,
    observers: Observers | None = None,
    layers: Sequence[LayerView] | None = None,
    source_digest: str | None = None,
) -> Trace:
    """Observe a model in memory; see `mixtura.running.observing.observe`."""
    module = model.model if isinstance(model, MemoryView) else plain_model(model)
    if layers is None:
        layers = (model if isinstance(model, MemoryView) else open_model(module)).layers
    if tokens.num_tokens == 0:
        raise UserError("there is no text to observe: every position is padding; give at least one token")
    cursor = Cursor()
    batches = packed(tokens).split(batch_tokens or DEFAULT_BATCH_TOKENS)
    every = -(-tokens.num_tokens // keep_logits) if keep_logits else 0
    wanted = Wanted(tuple(statistics), tuple(features), keep_choices, every)
    with (
        _bar(tokens.num_tokens, progress) as advance,
        recording(module, layers, cursor, len(tokens.domain_names), wanted) as (recorders, _),
    ):
        ticker = _Ticker(cursor, len(recorders), advance)
        watching = {r.layer.name: Several([r, *_extra(r.layer, observers), ticker]) for r in recorders}
        # What was compiled before does not know of the observers.
        with attached(module, watching, cursor), torch.compiler.set_stance("force_eager"):
            _run(module, batches, cursor, recorders)
    digest = memory_digest(module) if source_digest is None else source_digest
    return trace_of(module, tokens, recorders, digest, wanted)


@final
@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be recorded of every layer, beside counts and weights."""

    statistics: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    keep_choices: bool = False
    logits_every: int = 0


@contextmanager
def recording(
    module: nn.Module, layers: Sequence[LayerView], cursor: Cursor, num_domains: int, wanted: Wanted
) -> Iterator[tuple[list[LayerRecorder], list[Caught]]]:
    """A recorder for every layer and what is caught of it while it runs; they are still to be attached.

    Raises:
        UnknownNameError: there is no such statistic or feature.
    """
    # A statistic given as the path of its file is kept under its name.
    measures = {header("statistics", name).name: create("statistics", name) for name in wanted.statistics}
    fields = caught_for(measures.values(), wanted.features, keep_logits=bool(wanted.logits_every))
    with ExitStack() as stack:
        caught = [stack.enter_context(catching(module, layer, fields)) for layer in layers]
        yield (
            [
                LayerRecorder(
                    layer,
                    cursor,
                    num_domains,
                    measures,
                    caught=one,
                    features=wanted.features,
                    keep_choices=wanted.keep_choices,
                    logits_every=wanted.logits_every,
                )
                for layer, one in zip(layers, caught, strict=True)
            ],
            caught,
        )


def trace_of(
    module: nn.Module,
    tokens: TokenBatch,
    recorders: Sequence[LayerRecorder],
    source_digest: str,
    wanted: Wanted,
) -> Trace:
    """What recorders have seen of a text, as one record."""
    config: Any = module.config
    lengths = tokens.attention_mask.sum(1)
    return Trace(
        source_digest=source_digest,
        model_type=str(getattr(config, "model_type", "")),
        domains=tokens.domain_names,
        num_tokens=_tokens_by_domain(tokens),
        layers=tuple(r.trace(_expert_num_bytes(module, r.layer)) for r in recorders),
        sequence_lengths=tuple(length for length in lengths.tolist() if length),
        sequence_domains=tuple(tokens.domains[lengths > 0].tolist()),
        token_ids=tokens.input_ids[tokens.attention_mask.bool()].int() if wanted.keep_choices else None,
        logits_every=max(1, wanted.logits_every),
    )


def memory_digest(model: nn.Module) -> str:
    """``memory:...``, a name for a model in memory by its config alone; its weights are not read."""
    config: Any = model.config
    return f"memory:{hashlib.sha256(config.to_json_string(use_diff=False).encode()).hexdigest()}"


@torch.no_grad()
def _run(
    model: nn.Module, batches: Iterable[TokenBatch], cursor: Cursor, recorders: Sequence[LayerRecorder]
) -> None:
    for batch in batches:
        _forward(model, batch, cursor)
        for recorder in recorders:
            recorder.check_finite()


def _extra(layer: LayerView, observers: Observers | None) -> list[AssignmentObserver]:
    made = observers(layer) if observers is not None else None
    return [] if made is None else [made]


@final
class _Ticker:
    """Moves the progress bar whenever a layer is done: one batch may be the whole text."""

    def __init__(self, cursor: Cursor, num_layers: int, advance: Callable[[float], None]) -> None:
        self._cursor = cursor
        self._num_layers = num_layers
        self._advance = advance

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """Nothing is done yet."""

    def expert(
        self,
        expert: int,
        token_ids: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
        inputs: Float[Tensor, "N D"],
        outputs: Float[Tensor, "N D"],
    ) -> None:
        """An expert is a part of a layer."""

    def finish(self) -> None:
        """A layer is done."""
        self._advance(int(self._cursor.valid.sum()) / self._num_layers)


def _expert_num_bytes(model: nn.Module, layer: LayerView) -> int:
    """Bytes of one expert as it is stored, on disk or in memory."""
    if isinstance(layer, DiskLayer | PackedLayer):
        return layer.expert_num_bytes
    packed = getattr(getattr(submodule(model, layer.name), "mixtura_store", None), "num_bytes", None)
    if isinstance(packed, int):
        return packed // layer.num_experts
    return sum(tensor.nbytes for tensor in layer.native_expert(0) if tensor is not None)


def _tokens_by_domain(tokens: TokenBatch) -> tuple[int, ...]:
    lengths = tokens.attention_mask.sum(dim=1)
    found = torch.zeros(len(tokens.domain_names), dtype=torch.int64)
    return tuple(found.index_add_(0, tokens.domains, lengths.to(torch.int64)).tolist())


def packed(tokens: TokenBatch) -> TokenBatch:
    """The same text with all padding on the right, where causal models cannot see it."""
    filled = tokens.attention_mask.any(dim=1)
    mask, input_ids = tokens.attention_mask[filled], tokens.input_ids[filled]
    order = torch.sort(mask, dim=1, descending=True, stable=True).indices
    return TokenBatch(
        input_ids.gather(1, order), mask.gather(1, order), tokens.domains[filled], tokens.domain_names
    )


def _forward(model: nn.Module, batch: TokenBatch, cursor: Cursor) -> None:
    """One forward with the cursor on this batch; nothing of its output is kept."""
    valid: Bool[Tensor, "S T"] = batch.attention_mask.bool()
    domains: Int[Tensor, "S T"] = batch.domains[:, None].expand_as(valid)
    cursor.move(valid.reshape(-1), domains.reshape(-1))
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        use_cache=False,
        **few,
    )


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error that counts tokens; gives the function that advances it."""
    console = screen(stderr=True)
    columns = (
        TextColumn("observing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    hidden = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("observing", total=total)
        yield lambda count: bar.advance(task, count)
