"""A compression from beginning to end: check, observe, round, write, measure, publish."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch

import mixtura
from mixtura.checkpoints.apply import apply_plan, card_text, planned_num_bytes
from mixtura.checkpoints.applying.card import MeasuredLoss
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.matrices import packable_matrices
from mixtura.checkpoints.packed import is_packed
from mixtura.checkpoints.rounded import RoundedExperts
from mixtura.checkpoints.skeleton import CheckpointView, build, open_checkpoint
from mixtura.data.tokens import TokenBatch
from mixtura.errors import MixturaError, UnsupportedModelError
from mixtura.fitting.compressing.checking import (
    Methods,
    check_keep,
    check_places,
    check_room,
    check_text,
    make_methods,
)
from mixtura.fitting.compressing.measuring import Measure
from mixtura.fitting.compressing.neurons import check_neurons, kept_width, trim_plan
from mixtura.fitting.compressing.ordinary import check_handed, hand_over
from mixtura.fitting.compressing.passing import observed, rounded
from mixtura.fitting.compressing.reading import read_texts
from mixtura.fitting.compressing.records import KIND_OF, Choices, Compressed, LayerRounding
from mixtura.fitting.compressing.rounding import Shrunk, roundings
from mixtura.fitting.compressing.telling import (
    FEW_TOKENS,
    commands,
    few_by_trace,
    few_of,
    merged_groups,
    notes_of,
)
from mixtura.fitting.journal import Journal, open_journal
from mixtura.fitting.publishing import (
    beside,
    note_result,
    noted_result,
    put_in_place,
    replace_text,
    timed,
)
from mixtura.fitting.quality import ALL
from mixtura.fitting.records import Quality
from mixtura.fitting.texts import Texts, as_batch
from mixtura.methods import header
from mixtura.methods.trimmers import Trimmer
from mixtura.running.gguf import GgufExport
from mixtura.running.observing.passing import Wanted, packed
from mixtura.types import VLLM_ROUTER_COUNTS, Budget, Plan, QuantizeMatrix

Notify = Callable[[str], None]

_MODEL, _HANDED, _RESULT, _CARD = "model", "handed", "compressed.json", "README.md"


@final
@dataclass(slots=True)
class _Work:
    """One compression as it goes along."""

    choices: Choices
    view: CheckpointView
    methods: Methods
    texts: Texts
    tokens: TokenBatch
    kept: int | None
    journal: Journal
    notify: Notify
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """Where the new checkpoint is written before it is published."""
        return self.journal.path(_MODEL)

    @property
    def result(self) -> Path:
        """The checkpoint that is published."""
        handed = self.choices.to_format == "compressed-tensors"
        return self.journal.path(_HANDED) if handed else self.model


def carry_out(choices: Choices, notify: Notify) -> Compressed:
    """Do what was chosen; see `mixtura.compress`.

    Raises:
        UserError: it cannot be done as asked; says why and what can.
    """
    choices = replace(choices, name=choices.name or str(choices.model))
    methods = make_methods(choices)
    done = _published(choices)
    if done is not None:
        return done
    check_places(choices)
    view = open_checkpoint(choices.model)
    kept = check_keep(choices, view)
    if methods.trimmer is not None:
        check_neurons(choices, view, methods.trimmer)
    if choices.to_format == "gguf":
        # Making one finds what llama.cpp does not know, before hours of work.
        GgufExport(choices.model, choices.types)
    elif choices.to_format == "compressed-tensors":
        check_handed(choices, methods, view)
    texts = read_texts(
        view,
        choices.text,
        tokens=choices.tokens,
        seed=choices.seed,
        length=choices.length,
        held_out_tokens=choices.held_out_tokens,
    )
    tokens = packed(as_batch(texts.calibration))
    check_text(view, tokens.num_tokens)
    check_room(choices, view, methods, kept, tokens.input_ids.numel())
    settings = _settings(choices, texts)
    with open_journal(beside(choices.out), settings, "compression", "") as journal:
        work = _Work(choices, view, methods, texts, tokens, kept, journal, notify)
        made = _made(work)
        _publish(work, made)
    shutil.rmtree(beside(choices.out))
    return made


def _settings(choices: Choices, texts: Texts) -> dict[str, Any]:
    """All that decides the bytes of the result: stopped work begun with other values is not continued."""
    plain = ("keep", "keep_neurons", "bits", "rest_bits", "servable", "tokens", "length", "seed")
    named = {name: getattr(choices, name) for name in plain}
    return {
        **named,
        **{choice: choices.method(choice) for choice in KIND_OF},
        "settings": {choice: dict(given) for choice, given in choices.settings.items()},
        "model": checkpoint_digest(choices.model),
        "text": texts.digest,
        "measure": choices.measure,
        "format": choices.to_format,
        "types": list(choices.types),
        "threads": torch.get_num_threads(),
        "mixtura": mixtura.__version__,
        "torch": torch.__version__,
    }


def _made(work: _Work) -> Compressed:
    """The new checkpoint, written in the work directory, and what is known of it."""
    trace = None
    plan = Plan(checkpoint_digest(work.view.path))
    if work.methods.reducer is not None:
        with timed(work.seconds, "observe"):
            trace = observed(work.view, work.tokens, _wanted(work), work.journal, work.notify)
        plan = work.methods.reducer.plan(trace, _budget(work))
    few = {} if trace is None else few_by_trace(trace, plan)
    if work.methods.trimmer is not None:
        with timed(work.seconds, "observe"):
            plan, loads = _trimmed(work, work.methods.trimmer)
        few = few_of(loads)
    kept, rounding = None, tuple[LayerRounding, ...]()
    if work.methods.quantizer is not None:
        shrunk = Shrunk(plan, str(work.choices.quantize), work.methods.quantizer_settings)
        with timed(work.seconds, "round"):
            kept = rounded(work.view, shrunk, work.tokens, work.journal, work.notify)
        rounding, loads = roundings(work.view.layers, shrunk, kept)
        few = few_of(loads)
        plan = shrunk.whole_plan(work.view.layers)
    plan = _with_rest(work, plan)
    with timed(work.seconds, "write"):
        num_bytes = _write(work, plan, kept)
    before, after = None, None
    if work.choices.measure:
        with timed(work.seconds, "measure"):
            before, after = _measure(work, plan, kept)
    if work.choices.to_format == "compressed-tensors":
        num_bytes = _hand_over(work, after)
    ordinary = not is_packed(work.result)
    return Compressed(
        model=work.choices.name,
        out=work.choices.out,
        dropped=plan.dropped(),
        width=_width(work.view, plan),
        merged=merged_groups(plan),
        rounding=rounding,
        seldom=few,
        few=FEW_TOKENS,
        num_tokens=work.tokens.num_tokens,
        bytes_before=work.view.num_bytes,
        bytes_after=num_bytes,
        quality=after,
        quality_before=before,
        ordinary=ordinary,
        untouched=_untouched(work.view, plan),
        commands=commands(work.choices, ordinary=ordinary),
        notes=notes_of(work.choices, work.view, plan),
        seconds=work.seconds,
    )


def _trimmed(work: _Work, trimmer: Trimmer) -> tuple[Plan, dict[int, dict[int, int]]]:
    """Neurons taken out of every expert, and how many tokens each saw."""
    assert work.choices.keep_neurons is not None
    width = kept_width(work.view, work.choices.keep_neurons)
    return trim_plan(work.view, trimmer, width, work.tokens, work.journal, work.notify)


def _width(view: CheckpointView, plan: Plan) -> tuple[int, int] | None:
    """Neurons of an expert before and after a plan."""
    gone = next(iter(plan.trimmed().values()), None)
    before = view.layers[0].shape.d_expert
    return None if gone is None else (before, before - len(gone))


def _wanted(work: _Work) -> Wanted:
    """What the method that makes experts fewer reads, by its tags."""
    choice = "prune" if work.choices.prune is not None else "merge"
    tags = header(KIND_OF[choice], str(work.choices.method(choice))).tags

    def named(family: str) -> tuple[str, ...]:
        return tuple(tag.partition(":")[2] for tag in tags if tag.startswith(f"{family}:"))

    return Wanted(named("statistic"), named("feature"))


def _budget(work: _Work) -> Budget:
    counts = VLLM_ROUTER_COUNTS if work.choices.servable else None
    return Budget(num_experts=work.kept, counts=counts)


def _write(work: _Work, plan: Plan, kept: RoundedExperts | None) -> int:
    """Write the checkpoint unless that has been done; bytes of its tensors, which were predicted."""
    predicted = planned_num_bytes(plan, work.view.path)
    if not work.model.is_dir():
        work.notify("writing the model")
        apply_plan(
            plan,
            work.view.path,
            work.model,
            progress=False,
            source_name=work.choices.name,
            name=work.choices.out.name,
            rounded=kept,
        )
    found = open_checkpoint(work.model).num_bytes
    if found != predicted:
        raise MixturaError(f"{work.model} holds {found} bytes of tensors, and {predicted} were predicted")
    return found


def _measure(work: _Work, plan: Plan, kept: RoundedExperts | None) -> tuple[Quality, Quality]:
    """Loss of what was written, which its card then tells of."""
    measure = Measure(work.texts.held_out, work.journal, work.choices.seed, work.notify)
    before, after = measure.before(work.view), measure.after(work.model)
    loss = MeasuredLoss(
        kl=after.kl,
        kl_interval=(after.kl_low, after.kl_high),
        same_token=after.equal_top,
        perplexity=after.perplexity[ALL],
        num_tokens=after.num_tokens,
        text="held-out text",
        details=f"`{_RESULT}` has all of it.",
    )
    names = {"source_name": work.choices.name, "name": work.choices.out.name}
    card = card_text(plan, work.view.path, rounded=kept, measured=loss, **names)
    replace_text(work.model / _CARD, card)
    return before, after


def _hand_over(work: _Work, quality: Quality | None) -> int:
    """The checkpoint as transformers reads it, unless that has been done; bytes of its tensors."""
    work.notify(f"writing {work.choices.out.name}")
    names = {"source_name": work.choices.name, "name": work.choices.out.name}
    return hand_over(work.model, work.result, **names, quality=quality)


def _with_rest(work: _Work, plan: Plan) -> Plan:
    """The plan with what is outside the routed experts in fewer bits, where that is asked for."""
    if work.choices.rest_bits is None:
        return plan
    settings = {"bits": work.choices.rest_bits}
    names = packable_matrices(build(work.view), work.view)
    rest = [QuantizeMatrix(name, "round_to_nearest", dict(settings)) for name in names]
    return replace(plan, actions=(*plan.actions, *rest))


def _untouched(view: CheckpointView, plan: Plan) -> int:
    """Bytes of tensors that hold no routed experts and are as they were."""
    inside = {
        name
        for layer in view.layers
        for names in (layer.fused_tensor_names(), *map(layer.expert_tensor_names, range(layer.num_experts)))
        for name in names
    }
    return sum(
        entry.num_bytes for name, entry in view.entries.items() if name not in inside | plan.matrices().keys()
    )


def _publish(work: _Work, made: Compressed) -> None:
    """Put the result in its place in one step."""
    note_result(work.journal, work.choices, made.to_dict())
    if work.choices.to_format == "gguf":
        _export(work)
        return
    put_in_place(work.result, work.choices.out, _RESULT, made.to_dict())


def _export(work: _Work) -> None:
    """The checkpoint as a GGUF file."""
    if is_packed(work.model):
        raise UnsupportedModelError(
            "what these choices make has no ordinary form, which a GGUF file is made from; choose others, or "
            "leave --format out"
        )
    work.notify(f"writing {work.choices.out.name}")
    made = GgufExport(work.model, work.choices.types, name=work.choices.out.stem)
    importance = made.importance(work.choices.text) if made.calibrates else None
    made.write(work.choices.out, importance)


def _published(choices: Choices) -> Compressed | None:
    """The result of work that was stopped right after it had been put in its place."""
    there = choices.out.is_file() or (choices.out / "config.json").is_file()
    noted = noted_result(choices.out, choices, is_there=there)
    return None if noted is None else Compressed.from_dict(noted)
