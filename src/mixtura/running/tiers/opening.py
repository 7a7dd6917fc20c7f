"""Giving a model's experts modules stores of tiers, within a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.checkpoints.skeleton import CheckpointView, empty_experts
from mixtura.checkpoints.viewing.beside import adapter_of
from mixtura.errors import SettingError, UnsupportedModelError, UserError
from mixtura.machine.releases import given_cache
from mixtura.methods import create, header
from mixtura.methods.prefetchers import Prefetcher
from mixtura.report.units import parse_bytes
from mixtura.running.tiers.ahead import Ahead, room_for_guesses
from mixtura.running.tiers.budget import Division, SlotPlan, divide
from mixtura.running.tiers.choosing import AUTO, cache_of
from mixtura.running.tiers.core import Tiers
from mixtura.running.tiers.lessons import Lesson
from mixtura.running.tiers.reading import Reader
from mixtura.running.tiers.recipes import Recipe, recipe_of
from mixtura.running.tiers.slots import Slots
from mixtura.running.tiers.store import TieredStore
from mixtura.types.trace import Trace

NO_PREFETCH: Final = "none"
DEFAULT_CONTEXT: Final = 4096
_ATTRIBUTE: Final = "mixtura_tiers"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How a model is to run in little memory.

    Attributes:
        memory: bytes that the whole process may take, as a number or such as ``8GiB``.
        context: tokens of prompt and answer together.
        cache: name of the cache (see `mixtura.methods.caches`), or ``auto``: whichever would have missed
            least of late.
        prefetch: name of the prefetcher, or ``none``.
        trace: a file that `mixtura observe` wrote, for methods with the tag ``reads:trace``.
        more_bytes: memory that the pool is to leave for whoever runs several texts at once: their caches
            beside the first one's, and what a step of several takes.
        pool_slots: slots of each size, whatever the budget; for tests and measurements.
    """

    memory: int | str | None = None
    context: int = DEFAULT_CONTEXT
    cache: str = AUTO
    prefetch: str = NO_PREFETCH
    trace: str | Path | None = None
    more_bytes: int = 0
    pool_slots: int | None = None

    def check(self) -> None:
        """Look at what can be looked at before anything is read.

        Raises:
            UserError: a size is none, a name is unknown, or a cache is one that no model can run with.
        """
        if isinstance(self.memory, str):
            parse_bytes(self.memory)
        if self.context < 1:
            raise SettingError(f"the context must be at least 1 token, got {self.context}")
        if "oracle" in self.cache_tags:
            raise SettingError(
                f"the cache {self.cache!r} reads the future, which no running model knows; give another, "
                "such as auto, and see 'mixtura arena caches' for how near it comes"
            )
        named = [("caches", self.cache)] * (self.cache != AUTO)
        named += [("prefetchers", self.prefetch)] * (self.prefetch != NO_PREFETCH)
        for kind, name in named:
            if "reads:trace" in header(kind, name).tags and self.trace is None:
                raise SettingError(
                    f"{name!r} goes by a recorded trace; write one with 'mixtura observe MODEL --save FILE' "
                    "and give it as trace"
                )

    @property
    def cache_tags(self) -> frozenset[str]:
        """What the cache asks for; nothing where it is chosen."""
        return frozenset() if self.cache == AUTO else frozenset(header("caches", self.cache).tags)


def add_tiers(model: PreTrainedModel, view: CheckpointView, wish: Wish) -> Tiers:
    """Let a skeleton's experts run from memory and disk; the rest of it is still to be filled.

    Raises:
        BudgetError: the model cannot run in so little.
    """
    layers = view.layers
    modules = [empty_experts(model, layer) for layer in layers]
    recipes = [recipe_of(view, layer, module) for layer, module in zip(layers, modules, strict=True)]
    memory = parse_bytes(wish.memory) if isinstance(wish.memory, str) else wish.memory
    division = None
    prefetcher: Prefetcher | None = None
    more = wish.more_bytes
    if wish.prefetch != NO_PREFETCH:
        prefetcher = create("prefetchers", wish.prefetch)
        assert isinstance(prefetcher, Prefetcher)
        more += prefetcher.num_bytes([recipe.num_experts for recipe in recipes], layers[0].shape.d_model)
    if wish.pool_slots is None:
        assert memory is not None
        division = divide(view, recipes, memory, wish.context, more=more)
        slots = division.slots
    else:
        slots = _counted(recipes, wish.pool_slots)
    if wish.trace is not None:
        lesson = Lesson.of(Trace.load(Path(wish.trace)), [recipe.num_experts for recipe in recipes])
    else:
        lesson = Lesson({}, {})
    reader = Reader()
    reader.open(entry.file for entry in view.entries.values())
    top_k = max(layer.top_k for layer in layers)
    tiers = _tiers(recipes, slots, wish, prefetcher, top_k, _Gates(model, view), reader)
    tiers.learn(lesson)
    for number, (layer, module) in enumerate(zip(layers, modules, strict=True)):
        module.mixtura_store = TieredStore(tiers, number, layer.shape.d_model)
    setattr(model, _ATTRIBUTE, (tiers, division))
    model.register_forward_pre_hook(_notice_texts, with_kwargs=True)
    return tiers


def tiers_of(model: Any) -> Tiers | None:
    """The tiers of a model that runs from memory and disk; None for one that is all in memory."""
    found = getattr(model, _ATTRIBUTE, None)
    return None if found is None else found[0]


def division_of(model: Any) -> Division | None:
    """How the budget of such a model was divided."""
    found = getattr(model, _ATTRIBUTE, None)
    return None if found is None else found[1]


def _counted(recipes: Sequence[Recipe], num_slots: int) -> tuple[SlotPlan, ...]:
    counts = Counter(r.num_bytes(e) for r in recipes for e in r.owners)
    return tuple(SlotPlan(size, min(num_slots, counts[size]), counts[size]) for size in sorted(counts))


def _tiers(
    recipes: Sequence[Recipe],
    slots: Sequence[SlotPlan],
    wish: Wish,
    prefetcher: Prefetcher | None,
    top_k: int,
    gates: _Gates,
    reader: Reader,
) -> Tiers:
    pools = []
    for plan in slots:
        num_ahead = 0
        if prefetcher is not None:
            num_ahead = room_for_guesses(plan.num_slots, plan.num_experts, top_k)
        cache = cache_of(wish.cache, plan.num_slots - num_ahead, is_taught=wish.trace is not None)
        pools.append(Slots(plan.num_bytes, cache, num_ahead))
    ahead = None
    if prefetcher is not None and any(pool.num_ahead for pool in pools):
        ahead = Ahead(prefetcher, [recipe.num_experts for recipe in recipes], top_k, gates)
    scores: Callable[[int, Tensor], tuple[float, ...] | None] | None = None
    if "reads:scores" in wish.cache_tags:
        scores = gates
    return Tiers(recipes, pools, reader, ahead, scores)


@final
class _Gates:
    """What layers' routers think of tokens, by their matrices alone.

    Corrections, groups and scaling of the family are left out: it is for guesses, which need no more.
    """

    def __init__(self, model: PreTrainedModel, view: CheckpointView) -> None:
        self._model = model
        self._names = [(layer.site.router_weight, layer.num_experts) for layer in view.layers]

    @cached_property
    def _weights(self) -> list[Tensor]:
        parameters = dict(self._model.named_parameters())
        return [parameters[name][:num].detach() for name, num in self._names]

    def __call__(self, layer: int, x: Tensor) -> tuple[float, ...] | None:
        try:
            weight = self._weights[layer]
        except KeyError:
            return None
        if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
            return None
        # Not by a linear layer: those run on the kernels, which are held while experts are brought.
        with torch.no_grad():
            logits = torch.mm(x.to(weight.dtype), weight.T).float()
        return tuple(logits.softmax(-1).mean(0).tolist())


def _notice_texts(model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """A pass whose cache is empty, or that has none, begins a text."""
    cache = given_cache(named)
    tiers = tiers_of(model)
    if tiers is not None and (
        cache is None or not hasattr(cache, "get_seq_length") or not cache.get_seq_length()
    ):
        tiers.begin_text()


def require_whole(path: str | Path, device: torch.device | None, *, own: bool) -> None:
    """Refuse what does not go together with running from memory and disk.

    Raises:
        UserError: another device than the CPU, or a model that `mixtura train` wrote.
        UnsupportedModelError: an adapter lies beside the checkpoint.
    """
    if device is not None and device.type != "cpu":
        raise UserError(
            f"a model runs from memory and disk on the CPU only, not on {device}; leave device_map out"
        )
    if own:
        raise UserError(
            f"{path} holds a model of mixtura's own, which runs in memory only; leave memory out, or write "
            "it as a family of transformers first (mixtura.export)"
        )
    kind = adapter_of(Path(path))
    if kind is not None:
        raise UnsupportedModelError(
            f"{path} holds an adapter ({kind}), which a model that runs from disk cannot have; merge it "
            "(merge_and_unload of PEFT, then save_pretrained) and give the result"
        )
