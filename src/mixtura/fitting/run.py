"""A fit from beginning to end: account, observe, search, write, verify, report."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import mixtura
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.tokens import num_embeddings_of
from mixtura.errors import BudgetError, OutputError
from mixtura.fitting.budget import Allowance
from mixtura.fitting.clock import Clock, Notify
from mixtura.fitting.environment import environment
from mixtura.fitting.forms.base import Tools
from mixtura.fitting.forms.known import form_of
from mixtura.fitting.journal import open_journal
from mixtura.fitting.judging import Judge
from mixtura.fitting.ongoing import Ongoing, model_directory, work_directory, written
from mixtura.fitting.records import Prices, Quality, Request
from mixtura.fitting.report import report_html
from mixtura.fitting.result import Fitted, Row, Sample, time_over
from mixtura.fitting.rows import rows_of, samples_of
from mixtura.fitting.ruling import Rule, check_allocators, rules_of, source_bits
from mixtura.fitting.search import Found, Search
from mixtura.fitting.texts import Texts, sequence_length, texts_of
from mixtura.report.units import format_bytes

_SEQUENCE_LENGTH = 512
_REPORT = "report.html"
_MEASURED = "measured.json"


def fit(request: Request, notify: Notify = lambda _: None, *, keep_work: bool = False) -> Fitted:
    """Make a model fit a memory budget with the least measured loss.

    An interrupted fit goes on where it stopped when it is asked for again with the same settings.

    Args:
        request: the model, the budget and the rest of what the user asked for.
        notify: told in a few words what is being done.
        keep_work: leave what was measured, for another budget.

    Raises:
        UserError: the model, text, budget or output cannot be worked with; says why and what can.
    """
    check_out(request)
    check_allocators(request)
    view = open_checkpoint(request.model)
    form = form_of(request, view)
    notify("accounting for memory")
    allowed = form.allowance()
    for note in allowed.notes:
        notify(note)
    if allowed.account.total_bytes <= allowed.model_budget_bytes:
        return _unchanged(request, view, allowed)
    check_smallest(allowed)
    tokenizer = load_tokenizer(view.path)
    texts = texts_of(request, allowed.context, tokenizer, num_embeddings_of(view.config))
    clock = Clock(time.monotonic(), request.time_s)
    settings = _settings(request, view, allowed, texts)
    with open_journal(work_directory(request), settings) as journal:
        form.begin(Tools(journal, clock, notify))
        fitted = _run(
            Ongoing(request, form, view, tokenizer, allowed, form.in_time(texts), journal, notify, clock)
        )
    if not keep_work:
        shutil.rmtree(work_directory(request))
    return fitted


def check_out(request: Request) -> None:
    """Refuse an output directory that is there already, or a place that cannot be written."""
    out = request.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists already and is not empty; give a new directory with --out")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise OutputError(f"cannot write to {parent}; choose another place with --out")


def check_smallest(allowed: Allowance) -> None:
    """Refuse a budget that no plan can keep, with the smallest that one can."""
    needed = allowed.smallest_bytes
    if needed > allowed.model_budget_bytes:
        whole = needed + allowed.runtime_bytes
        raise BudgetError(
            f"the budget leaves {format_bytes(allowed.model_budget_bytes)} for the model, and the smallest "
            f"that still runs takes {format_bytes(needed)} (2 bits and as many experts as a token chooses, "
            f"with {allowed.context} tokens of context); give at least --model-memory {needed} or "
            f"--memory {whole}, or a shorter --context"
        )


def _settings(request: Request, view: CheckpointView, allowed: Allowance, texts: Texts) -> Mapping[str, Any]:
    """Everything that decides a measurement: a journal begun with other values is not continued.

    Budget, allowed loss and time decide what is measured, not what comes out.
    """
    return {
        "model": checkpoint_digest(view.path),
        # Text is cut to so much of it; what lies beyond only takes memory.
        "context": sequence_length(allowed.context),
        "text": texts.digest,
        "seed": request.seed,
        "format": request.form,
        "keep domain": request.keep_domain,
        "threads": torch.get_num_threads(),
        "mixtura": mixtura.__version__,
        "torch": torch.__version__,
    }


def _run(fit: Ongoing) -> Fitted:
    since = time.monotonic()
    seen = fit.form.observed(fit.texts)
    fit.timed("observe and price", since)
    since = time.monotonic()
    rules = _rules(fit, seen.prices)
    judge = Judge(
        fit.form,
        fit.texts.held_out,
        fit.journal,
        clock=fit.clock,
        seed=fit.request.seed,
        notify=fit.notify,
        shares=fit.texts.shares,
    )
    original = judge.original()
    # With what the budget leaves for the parts.
    found = Search(
        seen.prices,
        seen.importance,
        fit.allowance.expert_budget_bytes,
        judge.measure,
        rest_saves_bytes=fit.allowance.rest.saved_bytes,
        keep_domain=fit.request.keep_domain,
        rules=rules,
    ).run()
    fit.notes.extend(_unheard(found))
    fit.timed("search", since)
    if fit.request.max_kl is not None and found.chosen.quality.kl > fit.request.max_kl:
        raise BudgetError(_too_much_loss(found, fit))
    since = time.monotonic()
    directory = written(fit, found.chosen)
    fit.timed("write", since)
    since = time.monotonic()
    rows = rows_of(fit, found, original)
    samples = samples_of(fit, directory)
    fit.timed("verify and measure", since)
    return _published(fit, found, rows, samples)


def _rules(fit: Ongoing, prices: Prices) -> tuple[Rule, ...]:
    """What the allocators that were named predict."""
    names = fit.request.allocators
    return rules_of(names, prices, source_bits(fit.view.layers)) if names else ()


def _unheard(found: Found) -> tuple[str, ...]:
    """For the reader: allocators that were named and of which nothing was measured."""
    if not found.too_large:
        return ()
    return (
        f"the budget is too small for what {' and '.join(found.too_large)} would allocate, which drops no "
        f"experts; give a larger one to compare with it",
    )


def _published(
    fit: Ongoing,
    found: Found,
    rows: tuple[Row, ...],
    samples: tuple[Sample, ...],
) -> Fitted:
    """The result, with its measurements and report beside the model, in its place."""
    directory = model_directory(fit, found.chosen)
    told = fit.form.told(found.chosen.candidate, directory)
    fitted = Fitted(
        model=fit.request.name or str(fit.request.model),
        out=fit.request.out,
        budget_bytes=fit.allowance.budget_bytes,
        budget_kind=fit.allowance.kind,
        model_budget_bytes=fit.allowance.model_budget_bytes,
        runtime_bytes=fit.allowance.runtime_bytes,
        context=fit.allowance.context,
        plan=told.plan,
        rows=rows,
        tried=found.tried,
        choice_map=told.choice_map,
        columns=told.columns,
        options=fit.form.prices.palette.names,
        untouched=told.untouched,
        settings=told.settings,
        commands=told.commands,
        samples=samples,
        left_out=found.left_out,
        notes=(*fit.allowance.notes, *fit.texts.notes, *fit.form.notes, *fit.notes),
        about=environment(fit.request, fit.texts, fit.seconds),
    )
    _publish(fitted, directory)
    return fitted


def _too_much_loss(found: Found, fit: Ongoing) -> str:
    steps = sorted({(m.account_bytes, m.quality.kl) for m in found.tried})
    best: list[tuple[int, float]] = []
    for size, kl in steps:
        while best and best[-1][1] <= kl:
            break
        else:
            best.append((size, kl))
    over = "".join(f"{said}; " for said in time_over(found.left_out))
    costs = "; ".join(f"{format_bytes(size)} costs {kl:.4g}" for size, kl in best)
    return (
        f"the least loss measured within {format_bytes(fit.allowance.model_budget_bytes)} is "
        f"{found.chosen.quality.kl:.4g} nats per token, more than the --max-kl {fit.request.max_kl:g} "
        f"that is allowed; of the sizes measured, {costs}; {over}give more memory or allow more loss; the "
        f"same command with another budget or --max-kl goes on from what has been measured"
    )


def _unchanged(request: Request, view: CheckpointView, allowed: Allowance) -> Fitted:
    row = Row(
        name="before",
        label="",
        weights_bytes=allowed.account.weights_bytes,
        accounted_bytes=allowed.account.total_bytes,
        active_bytes=allowed.active_bytes,
        quality=Quality(kl=0.0, kl_low=0.0, kl_high=0.0, equal_top=1.0, perplexity={}, kl_by_domain={}),
    )
    return Fitted(
        model=request.name or str(view.path),
        out=None,
        budget_bytes=allowed.budget_bytes,
        budget_kind=allowed.kind,
        model_budget_bytes=allowed.model_budget_bytes,
        runtime_bytes=allowed.runtime_bytes,
        context=allowed.context,
        plan=None,
        rows=(row,),
        notes=allowed.notes,
    )


def _publish(fitted: Fitted, directory: Path) -> None:
    """Add the measurements and the report, and put everything in its place with one rename."""
    assert fitted.out is not None
    text = json.dumps(fitted.to_dict(), indent=1, sort_keys=True) + "\n"
    (directory / _MEASURED).write_text(text, encoding="utf-8")
    (directory / _REPORT).write_text(report_html(fitted), encoding="utf-8")
    if fitted.out.is_dir():
        fitted.out.rmdir()
    os.replace(directory, fitted.out)
