"""An upcycling from beginning to end: check, look, plan, write, try, publish."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import mixtura
from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.upcycling.apply import apply_upcycling, check_places, digests, load_plan, save_plan
from mixtura.checkpoints.upcycling.blueprint import blueprint
from mixtura.checkpoints.upcycling.checking import check_sources, settings_that_differ
from mixtura.checkpoints.upcycling.targets import OWN
from mixtura.errors import UserError
from mixtura.fitting.journal import Journal, open_journal
from mixtura.fitting.publishing import (
    beside,
    note_result,
    noted_result,
    put_in_place,
    replace_text,
    timed,
)
from mixtura.fitting.texts import Texts
from mixtura.fitting.upcycling.card import card_of
from mixtura.fitting.upcycling.editing import edited
from mixtura.fitting.upcycling.growing import grown
from mixtura.fitting.upcycling.planning import (
    become_of,
    carry_of,
    check_number,
    check_target,
    grows_layers,
    is_exact,
    plan_of,
    takes_moe,
    traced,
)
from mixtura.fitting.upcycling.reading import read_inputs
from mixtura.fitting.upcycling.records import RESULT, Request, Upcycled
from mixtura.fitting.upcycling.teaching import taught
from mixtura.fitting.upcycling.trying import balance_of, tried, tried_beside
from mixtura.fitting.upcycling.trying_own import tried_own
from mixtura.methods import create
from mixtura.methods.upcyclers import Upcycler
from mixtura.running.dense_tracing import Group
from mixtura.types import Plan
from mixtura.types.upcycling import UpcycleShape

Notify = Callable[[str], None]

_MODEL, _PLAN, _CARD = "model", "plan", "README.md"
_DEFAULT_EXPERTS = 8


@final
@dataclass(slots=True)
class _Work:
    """One upcycling as it goes along."""

    request: Request
    upcycler: Upcycler
    sources: tuple[DenseView, ...]
    shape: UpcycleShape
    groups: tuple[Group, ...]
    texts: Texts | None
    journal: Journal
    notify: Notify
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """Where the new checkpoint is written before it is published."""
        return self.journal.path(_MODEL)


def carry_out(request: Request, notify: Notify) -> Upcycled:
    """Do what was asked for; see `mixtura.upcycle` and `mixtura.compose`.

    Raises:
        UserError: it cannot be done as asked; says why and what can.
    """
    request = replace(request, names=request.names or tuple(str(path) for path in request.sources))
    upcycler: Upcycler = create("upcyclers", request.method, **request.settings)
    check_number(len(request.sources), request.composes, request.method)
    done = _published(request)
    if done is not None:
        return done
    default = len(request.sources) if request.composes else _DEFAULT_EXPERTS
    experts = request.experts or default
    shape = UpcycleShape(num_experts=experts, top_k=request.top_k, seed=request.seed)
    check_places(request.out, request.sources)
    if takes_moe(request.method):
        return edited(request, upcycler, notify)
    if grows_layers(request.method):
        return grown(request, upcycler, notify)
    sources = tuple(DenseView(path) for path in request.sources)
    check_sources(sources)
    check_target(sources[0], request.target, request.method)
    groups, texts = read_inputs(request, sources[0].path, sources[0].config)
    with open_journal(
        beside(request.out), _settings(request, sources, experts, groups, texts), "conversion", ""
    ) as journal:
        work = _Work(request, upcycler, sources, shape, groups, texts, journal, notify)
        made = _made(work)
        _publish(work, made)
    shutil.rmtree(beside(request.out))
    return made


def _settings(
    request: Request,
    sources: Sequence[DenseView],
    experts: int,
    groups: Sequence[Group],
    texts: Texts | None,
) -> dict[str, Any]:
    """All that decides the bytes of the result: stopped work begun with other values is not continued."""
    told = sha256()
    for group in groups:
        told.update(f"{group.expert} {group.negative}".encode())
        told.update(group.tokens.input_ids.numpy().tobytes())
        told.update(group.tokens.attention_mask.numpy().tobytes())
    return {
        "method": request.method,
        "settings": dict(request.settings),
        "experts": experts,
        "top_k": request.top_k,
        "target": request.target,
        "seed": request.seed,
        "measure": request.measure,
        "sources": list(digests(sources)),
        "names": list(request.names),
        "prompts": told.hexdigest(),
        "text": None if texts is None else texts.digest,
        "threads": torch.get_num_threads(),
        "mixtura": mixtura.__version__,
        "torch": torch.__version__,
    }


def _made(work: _Work) -> Upcycled:
    """The new checkpoint, written in the work directory, and what is known of it."""
    try:
        with timed(work.seconds, "plan"):
            plan, arrays = _planned(work)
    except UserError:
        # What is refused before there is a plan goes on with nothing, and would refuse other settings.
        shutil.rmtree(beside(work.request.out))
        raise
    made = _facts(work, plan, arrays)
    with timed(work.seconds, "write"):
        if not work.model.is_dir():
            work.notify("writing the model")
            card = _card(work, made)
            apply_upcycling(plan, arrays, work.sources, work.model, card=card, progress=False)
    if work.request.measure:
        with timed(work.seconds, "try"):
            made = _tried(work, made, plan)
    return replace(made, seconds=work.seconds)


def _planned(work: _Work) -> tuple[Plan, dict[str, Tensor]]:
    """The plan, kept so that text is read once however often the work is stopped."""
    kept = load_plan(work.journal.path(_PLAN))
    if kept is not None:
        return kept
    if work.groups:
        work.notify("reading what text shows of the dense models")
    trace = traced(work.sources, work.request.method, work.groups, work.notify)
    plan, arrays = plan_of(
        work.upcycler,
        work.sources,
        work.shape,
        trace,
        work.request.target,
        lambda recipe: taught(work.sources[0], recipe, work.shape, work.groups, work.notify),
    )
    save_plan(work.journal.path(_PLAN), plan, arrays)
    return plan, arrays


def _facts(work: _Work, plan: Plan, arrays: dict[str, Tensor]) -> Upcycled:
    become = become_of(plan)
    notes = list(settings_that_differ(work.sources))
    empty = [a for a in plan.actions if getattr(a, "expert", 0) is None and getattr(a, "scale", 1.0) == 0.0]
    if empty:
        notes.append(
            f"{become.family} must have an expert that every token visits, and the method makes none: there "
            f"is one of width {become.shared_width} that adds nothing at the start"
        )
    return Upcycled(
        out=work.request.out,
        method=work.request.method,
        settings=dict(work.request.settings),
        sources=work.request.names,
        family=become.family,
        num_experts=become.num_experts,
        top_k=become.top_k,
        d_expert=become.d_expert,
        shared_width=become.shared_width,
        bytes_before=work.sources[0].num_bytes,
        bytes_after=blueprint(work.sources, plan, arrays).num_bytes,
        promised=is_exact(plan, work.request.method),
        notes=tuple(notes),
    )


def _tried(work: _Work, made: Upcycled, plan: Plan) -> Upcycled:
    assert work.texts is not None
    held_out, names = work.texts.held_out, work.request.names
    first, states = tried(work.sources[0], names[0], held_out, work.notify)
    before = [first]
    before += [
        tried(view, name, held_out, work.notify)[0]
        for view, name in zip(work.sources[1:], names[1:], strict=True)
    ]
    if made.family == OWN:
        known = states if carry_of(plan).sources == (0,) else None
        found = tried_own(work.model, work.request.out.name, held_out, known, work.notify)
        return _with_card(work, replace(made, before=tuple(before), **found))
    view = open_checkpoint(work.model)
    beside = None
    if carry_of(plan).sources == (0,):
        after, beside = tried_beside(view, work.request.out.name, held_out, states, work.notify)
    else:
        after = tried(view, work.request.out.name, held_out, work.notify)[0]
    balance = balance_of(work.model, held_out, work.notify)
    return _with_card(work, replace(made, before=tuple(before), after=after, beside=beside, balance=balance))


def _with_card(work: _Work, made: Upcycled) -> Upcycled:
    """The facts, once the model card says them."""
    replace_text(work.model / _CARD, _card(work, made))
    return made


def _card(work: _Work, made: Upcycled) -> str:
    paths = [view.path for view in work.sources]
    return card_of(made, work.request.out.name, paths, digests(work.sources))


def _publish(work: _Work, made: Upcycled) -> None:
    """Put the result in its place in one step."""
    note_result(work.journal, work.request, made.to_dict())
    put_in_place(work.model, work.request.out, RESULT, made.to_dict())


def _published(request: Request) -> Upcycled | None:
    """The result of work that was stopped right after it had been put in its place."""
    noted = noted_result(request.out, request, is_there=(request.out / "config.json").is_file())
    return None if noted is None else Upcycled.from_dict(noted)
