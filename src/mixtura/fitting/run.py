"""A fit from beginning to end: account, observe, search, write, verify, report."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

import mixtura
from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.tokens import num_embeddings_of
from mixtura.errors import BudgetError, OutputError
from mixtura.fitting.budget import Allowance, allowance
from mixtura.fitting.candidates import smallest
from mixtura.fitting.environment import environment
from mixtura.fitting.journal import Journal, open_journal
from mixtura.fitting.judging import Judge
from mixtura.fitting.observing import importance_of, priced_trace
from mixtura.fitting.pricing import experts_of, option_bytes
from mixtura.fitting.records import OPTIONS, Measured, Prices, Quality, Request
from mixtura.fitting.report import report_html
from mixtura.fitting.result import Fitted, Row, Sample
from mixtura.fitting.search import Found, Search
from mixtura.fitting.texts import Texts, load_texts
from mixtura.fitting.verifying import Verified, sample_answers, verify
from mixtura.report.units import format_bytes
from mixtura.types import Plan
from mixtura.types.trace import Trace

Notify = Callable[[str], None]

_SEQUENCE_LENGTH = 512
_REPORT = "report.html"
_MEASURED = "measured.json"


@final
@dataclass(slots=True)
class _Fit:
    """What one fit knows as it goes along."""

    request: Request
    view: CheckpointView
    tokenizer: Any
    allowance: Allowance
    texts: Texts
    journal: Journal
    notify: Notify
    started: float
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, step: str, since: float) -> None:
        self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - since


def fit(request: Request, notify: Notify = lambda _: None) -> Fitted:
    """Make a model fit a memory budget with the least measured loss.

    An interrupted fit goes on where it stopped when it is asked for again with the same settings.

    Args:
        request: the model, the budget and the rest of what the user asked for.
        notify: told in a few words what is being done.

    Raises:
        UserError: the model, text, budget or output cannot be worked with; says why and what can.
    """
    started = time.monotonic()
    check_out(request)
    view = open_checkpoint(request.model)
    notify("accounting for memory")
    allowed = allowance(request, view)
    if allowed.account.total_bytes <= allowed.model_budget_bytes:
        return _unchanged(request, view, allowed)
    check_smallest(view, allowed)
    tokenizer = load_tokenizer(view.path)
    texts = load_texts(
        request.text,
        tokenizer,
        length=min(_SEQUENCE_LENGTH, allowed.context),
        calibration_tokens=request.calibration_tokens,
        held_out_tokens=request.held_out_tokens,
        seed=request.seed,
        num_embeddings=num_embeddings_of(view.config),
    )
    settings = _settings(request, view, allowed, texts)
    with open_journal(_work_directory(request), settings) as journal:
        fitted = _run(_Fit(request, view, tokenizer, allowed, texts, journal, notify, started))
    shutil.rmtree(_work_directory(request))
    return fitted


def check_out(request: Request) -> None:
    """Refuse an output directory that is there already, or a place that cannot be written."""
    out = request.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists already and is not empty; give a new directory with --out")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise OutputError(f"cannot write to {parent}; choose another place with --out")


def check_smallest(view: CheckpointView, allowed: Allowance) -> None:
    """Refuse a budget that no plan can keep, with the smallest that one can."""
    layers = view.layers
    sizes = np.concatenate([np.tile(option_bytes(x), (x.num_experts, 1)) for x in layers])
    blank = np.zeros((len(sizes), len(OPTIONS)))
    prices = Prices(experts_of(layers), sizes, blank, np.zeros(len(sizes), dtype=np.int64))
    rows = np.arange(len(sizes))
    least = int(sizes[rows, list(smallest(prices).choice)].sum())
    needed = allowed.fixed_bytes + least
    if needed > allowed.model_budget_bytes:
        whole = needed + allowed.runtime_bytes
        raise BudgetError(
            f"the budget leaves {format_bytes(allowed.model_budget_bytes)} for the model, and the smallest "
            f"that still runs takes {format_bytes(needed)} (2 bits and as many experts as a token chooses, "
            f"with {allowed.context} tokens of context); give at least --model-memory {needed} or "
            f"--memory {whole}, or a shorter --context"
        )


def _settings(request: Request, view: CheckpointView, allowed: Allowance, texts: Texts) -> Mapping[str, Any]:
    """Everything that decides the result: a journal begun with other values is not continued."""
    return {
        "model": checkpoint_digest(view.path),
        "memory": request.memory_bytes,
        "model_memory": request.model_memory_bytes,
        "model_budget_bytes": allowed.model_budget_bytes,
        "context": allowed.context,
        "text": texts.digest,
        "max_kl": request.max_kl,
        "seed": request.seed,
        "threads": torch.get_num_threads(),
        "mixtura": mixtura.__version__,
        "torch": torch.__version__,
    }


def _work_directory(request: Request) -> Path:
    return request.out.with_name(request.out.name + ".work")


def _run(fit: _Fit) -> Fitted:
    since = time.monotonic()
    trace, prices = priced_trace(fit.view, fit.texts, fit.journal, fit.notify)
    fit.timed("observe and price", since)
    since = time.monotonic()
    judge = Judge(
        fit.view,
        fit.texts.held_out,
        fit.journal,
        deadline=fit.started + fit.request.time_s,
        seed=fit.request.seed,
        notify=fit.notify,
    )
    judge.price_with(prices, fit.allowance.fixed_bytes, fit.allowance.dense_active_bytes)
    original = judge.original()
    found = _search(fit, trace, prices, judge)
    fit.timed("search", since)
    chosen = found.chosen
    if fit.request.max_kl is not None and chosen.quality.kl > fit.request.max_kl:
        raise BudgetError(_too_much_loss(found, fit))
    since = time.monotonic()
    plan = chosen.candidate.plan(prices.experts, trace.source_digest)
    model_directory = fit.journal.path("model")
    if not model_directory.is_dir():
        fit.notify("writing the model")
        apply_plan(
            plan,
            fit.view.path,
            model_directory,
            source_name=fit.request.name or None,
            name=fit.request.out.name,
        )
    fit.timed("write", since)
    since = time.monotonic()
    rows = _rows(fit, found, prices, original, trace.source_digest)
    samples = sample_answers(
        fit.view, fit.tokenizer, model_directory, fit.texts, fit.allowance.context, _whole(fit)
    )
    fit.timed("verify and measure", since)
    return _published(fit, found, prices, plan, rows, samples)


def _published(
    fit: _Fit,
    found: Found,
    prices: Prices,
    plan: Plan,
    rows: tuple[Row, ...],
    samples: tuple[Sample, ...],
) -> Fitted:
    """The result, with its measurements and report beside the model, in its place."""
    fitted = Fitted(
        model=fit.request.name or str(fit.request.model),
        out=fit.request.out,
        budget_bytes=fit.allowance.budget_bytes,
        budget_kind=fit.allowance.kind,
        model_budget_bytes=fit.allowance.model_budget_bytes,
        runtime_bytes=fit.allowance.runtime_bytes,
        context=fit.allowance.context,
        plan=plan,
        rows=rows,
        tried=found.tried,
        choice_map=_choice_map(prices, found.chosen),
        untouched=_untouched(fit.view),
        samples=samples,
        out_of_time=found.out_of_time,
        about=environment(fit.request, fit.texts, fit.seconds),
    )
    _publish(fitted, fit.journal.path("model"))
    return fitted


def _search(fit: _Fit, trace: Trace, prices: Prices, judge: Judge) -> Found:
    """The search, with what the budget leaves for the experts."""
    return Search(prices, importance_of(trace), fit.allowance.expert_budget_bytes, judge.measure).run()


def _too_much_loss(found: Found, fit: _Fit) -> str:
    steps = sorted({(m.account_bytes, m.quality.kl) for m in found.tried})
    best: list[tuple[int, float]] = []
    for size, kl in steps:
        while best and best[-1][1] <= kl:
            break
        else:
            best.append((size, kl))
    costs = "; ".join(f"{format_bytes(size)} costs {kl:.4g}" for size, kl in best)
    return (
        f"the least loss measured within {format_bytes(fit.allowance.model_budget_bytes)} is "
        f"{found.chosen.quality.kl:.4g} nats per token, more than the --max-kl {fit.request.max_kl:g} "
        f"that is allowed; of the sizes measured, {costs}; give more memory or allow more loss"
    )


def _verify_all(fit: _Fit, found: Found, prices: Prices, digest: str) -> dict[str, Verified]:
    """Generate with the written model, with the uniform plan beside it and, if it fits, the original."""
    context = fit.allowance.context
    chosen = verify(fit.journal.path("model"), context, fit.journal, "chosen", fit.notify)
    if found.uniform.candidate.key == found.chosen.candidate.key:
        return {"before": _verify_before(fit), "uniform": chosen, "chosen": chosen}
    uniform_directory = fit.journal.path("uniform")
    if "verified uniform" not in fit.journal.notes() and not uniform_directory.is_dir():
        plan = found.uniform.candidate.plan(prices.experts, digest)
        apply_plan(plan, fit.view.path, uniform_directory)
    uniform = verify(uniform_directory, context, fit.journal, "uniform", fit.notify)
    shutil.rmtree(uniform_directory, ignore_errors=True)
    return {"before": _verify_before(fit), "uniform": uniform, "chosen": chosen}


def _whole(fit: _Fit) -> int:
    """What a process with the original takes."""
    return fit.allowance.account.total_bytes + fit.allowance.runtime_bytes


def _verify_before(fit: _Fit) -> Verified:
    needed = _whole(fit)
    return verify(
        fit.view.path, fit.allowance.context, fit.journal, "before", fit.notify, needed_bytes=needed
    )


def _rows(fit: _Fit, found: Found, prices: Prices, original: Quality, digest: str) -> tuple[Row, ...]:
    """The table: before, uniform, chosen."""
    verified = _verify_all(fit, found, prices, digest)
    uniform, chosen = found.uniform, found.chosen
    return (
        _row(fit, "before", "", None, verified["before"], original),
        _row(fit, "uniform", uniform.candidate.label, uniform, verified["uniform"], uniform.quality),
        _row(fit, "chosen", chosen.candidate.label, chosen, verified["chosen"], chosen.quality),
    )


def _row(
    fit: _Fit,
    name: str,
    label: str,
    measured: Measured | None,
    verified: Verified,
    quality: Quality,
) -> Row:
    account = fit.allowance.account
    return Row(
        name=name,
        label=label,
        weights_bytes=verified.weights_bytes or account.weights_bytes,
        accounted_bytes=verified.accounted_bytes or account.total_bytes,
        active_bytes=fit.allowance.active_bytes if measured is None else measured.active_bytes,
        quality=quality,
        tokens_per_second=verified.tokens_per_second,
        peak_bytes=verified.peak_bytes,
        note=verified.note,
    )


def _choice_map(prices: Prices, chosen: Measured) -> dict[int, tuple[str, ...]]:
    options = np.asarray(chosen.candidate.choice)
    layers = dict.fromkeys(prices.experts.layers.tolist())
    return {
        int(layer): tuple(OPTIONS[option] for option in options[prices.experts.of_layer(layer)])
        for layer in layers
    }


def _untouched(view: CheckpointView) -> tuple[str, ...]:
    """Tensors outside the routed experts; routers lose rows only where experts are dropped."""
    experts = {
        name
        for layer in view.layers
        for e in range(layer.num_experts)
        for name in layer.expert_tensor_names(e)
    }
    return tuple(name for name in view.tensor_names if name not in experts)


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
