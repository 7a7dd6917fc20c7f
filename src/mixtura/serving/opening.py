"""A model opened to be served: how its memory is divided, and the engine that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

from transformers import PreTrainedModel

from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.errors import SettingError
from mixtura.kernels.loads import count_loads
from mixtura.methods.decoders import Decoder
from mixtura.running.adapters import adapter_bytes, with_adapter
from mixtura.running.decoders.composing import parts_of
from mixtura.running.loading import is_own_model, load
from mixtura.running.memory.accounting import account
from mixtura.running.tiers.opening import DEFAULT_CONTEXT, Wish
from mixtura.serving.engine.lanes import PROMPT_LOGITS
from mixtura.serving.engine.loop import DEFAULT_TEXTS, Engine, Limits, engine_of
from mixtura.serving.engine.records import Adapters

# What answering takes beside the model: libraries (33 MiB measured), requests, answers that wait to be read.
_ANSWERING_BYTES: Final = 64 << 20
_LOGITS_COPIES: Final = 3


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a model is to be served.

    Attributes:
        memory: as `mixtura.load` takes it; None for all of the model in memory. Its context is set here.
        context: tokens of prompt and answer of one request; None for what the model was made for, up to 4096.
        cache_bytes: memory for keys and values of all requests and of beginnings that are kept; None for four
            full contexts.
        running: requests that run together.
        waiting: requests that may wait.
        keeps_prefixes: whether beginnings are kept to not be read again.
        bits: as `mixtura.load` takes them.
        adapters: directories of adapters by the names that requests choose them by.
        calibrations: files that decoders read.
        decoder: that is to be ready, as nothing would be answered without it.
    """

    memory: Wish | None = None
    context: int | None = None
    cache_bytes: int | None = None
    running: int = 16
    waiting: int = 64
    keeps_prefixes: bool = True
    bits: int | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    calibrations: tuple[Path, ...] = ()
    decoder: Decoder | None = None


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is ready to be served.

    Attributes:
        engine: runs it.
        tokenizer: the model's.
        loads: tokens that each expert had, by the number of its decoder layer.
    """

    engine: Engine
    tokenizer: Any
    loads: tuple[tuple[int, Any], ...]


def open_model(
    path: Path, serving: Serving, adapt: Callable[[PreTrainedModel], PreTrainedModel] | None = None
) -> Opened:
    """Open a model and start its engine.

    Args:
        path: a checkpoint directory.
        serving: how.
        adapt: changes the model before it is served, as putting an adapter into it does.

    Raises:
        SettingError: the context is longer than the model was made for.
        UserError: the adapters cannot be on one model, or the decoder does not suit it.
        UnmetError: there is not so much memory.
        BudgetError: the model cannot be served in so little; the message says the smallest that is enough.
        CheckpointError: the directory is missing, incomplete or damaged.
    """
    tokenizer = load_tokenizer(path)
    cache_bytes = serving.cache_bytes
    loads: tuple[tuple[int, Any], ...] = ()
    if is_own_model(path):
        model = load(path)
        context = _context(model.config, serving.context)
    else:
        view = open_checkpoint(path, bits=serving.bits)
        context = _context(view.config, serving.context)
        wish = None
        if serving.memory is not None:
            cache_bytes, wish = _divided(view, serving, serving.memory, context)
        model = load(path, bits=serving.bits, memory=wish)
        loads = _counting(model, view)
    if adapt is not None:
        model = adapt(model)
    chosen = _with_adapters(model, serving.adapters) if serving.adapters else None
    if adapt is not None or chosen is not None:
        from mixtura.adapting.selecting import require_servable

        require_servable(model)
    limits = Limits(context=context, running=serving.running, waiting=serving.waiting)
    keeps = serving.keeps_prefixes
    engine = engine_of(
        model, tokenizer, limits, cache_bytes, keeps_prefixes=keeps, adapters=chosen,
        calibrations=serving.calibrations,
    )  # fmt: skip
    if serving.decoder is not None:
        engine.passes.steers.ready(parts_of(serving.decoder))
    for _, counts in loads:
        # What trials of the model's paths counted.
        counts.zero_()
    return Opened(engine, tokenizer, loads)


def _with_adapters(model: PreTrainedModel, adapters: Mapping[str, Path]) -> Adapters:
    """Put adapters on a model, in it, and let passes choose of them."""
    adapted: Any = model
    for name, path in adapters.items():
        adapted = with_adapter(adapted, path, name)
    from mixtura.adapting.selecting import Selection

    return Selection(adapted)


def _context(config: Any, wanted: int | None) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        return min(int(positions), DEFAULT_CONTEXT) if positions else DEFAULT_CONTEXT
    if wanted < 2:
        raise SettingError(f"the context must be at least 2 tokens, got {wanted}")
    if positions and wanted > positions:
        raise SettingError(
            f"the model was made for {positions} positions, so a context of {wanted} tokens cannot be; give "
            f"at most {positions}"
        )
    return wanted


def _divided(view: CheckpointView, serving: Serving, memory: Wish, context: int) -> tuple[int, Wish]:
    """Memory for caches, and the wish that leaves it."""
    one = account(view, context).kv_cache_bytes
    caches = serving.cache_bytes or DEFAULT_TEXTS * one
    vocabulary = int(view.config.get_text_config().vocab_size)
    rows = max(serving.running, PROMPT_LOGITS)
    # Several caches laid side by side where no compiled step reads them where they lie: one layer at a time.
    copies = 2 * caches // max(len(view.layers), 1)
    more = max(caches - one, 0) + copies + _LOGITS_COPIES * 4 * rows * vocabulary + _ANSWERING_BYTES
    more += sum(adapter_bytes(path) for path in serving.adapters.values())
    return caches, replace(memory, context=context, more_bytes=more)


def _counting(model: PreTrainedModel, view: CheckpointView) -> tuple[tuple[int, Any], ...]:
    """Let all experts of a model count their tokens."""
    return tuple(
        (layer.index, count_loads(model.get_submodule(layer.name), layer.num_experts))
        for layer in view.layers
    )
