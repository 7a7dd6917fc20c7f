"""The table of models: each generated with in a process of its own, and answers side by side."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from mixtura.fitting.ongoing import Ongoing, model_directory
from mixtura.fitting.records import Measured, Quality
from mixtura.fitting.result import Row, Sample
from mixtura.fitting.search import Found
from mixtura.fitting.verifying import Verified, sample_answers

# How much longer than its time a fit may take for checks that the result does not need.
_OVERRUN_SHARE = 0.25


def _has_time_to_check(fit: Ongoing) -> bool:
    """Whether what is not needed for the result may still be run: not long after the time is over."""
    return fit.clock.left_s > -_OVERRUN_SHARE * fit.clock.limit_s


def samples_of(fit: Ongoing, directory: Path) -> tuple[Sample, ...]:
    """Answers of the original and the new model, where there is time for them."""
    if not _has_time_to_check(fit):
        fit.notes.append("answers side by side were left out: the time was over")
        return ()
    fit.notify("answering a few questions with both")
    context = fit.allowance.context

    def ask(prompts: Sequence[str]) -> list[str]:
        return fit.form.answers(directory, fit.tokenizer, prompts, context)

    return sample_answers(fit.view, fit.tokenizer, ask, fit.texts, context, _whole(fit))


def _verify_all(fit: Ongoing, found: Found) -> dict[str, Verified]:
    """Generate with the written model, with the uniform plan beside it and, if it fits, the original."""
    chosen = _verify(fit, model_directory(fit, found.chosen), "chosen", found.chosen.candidate.key)
    if not _has_time_to_check(fit):
        late = Verified(None, None, None, None, "not run: the time was over")
        is_uniform = found.uniform.candidate.key == found.chosen.candidate.key
        return {"before": late, "uniform": chosen if is_uniform else late, "chosen": chosen}
    return {
        "before": _verify(fit, fit.view.path, "before", "original", needed_bytes=_whole(fit))
        if fit.form.runs_source
        else Verified(None, None, None, None),
        "uniform": _verify_uniform(fit, found) or chosen,
        "chosen": chosen,
    }


def _verify(fit: Ongoing, directory: Path, name: str, key: str, *, needed_bytes: int = 0) -> Verified:
    context = fit.allowance.context
    key = f"verified {key} with {context} tokens"
    return fit.form.verify(directory, name, key, context=context, needed_bytes=needed_bytes)


def _verify_uniform(fit: Ongoing, found: Found) -> Verified | None:
    """The plain plan, written for as long as it generates; None where it is the chosen one."""
    uniform = found.uniform
    if uniform.candidate.key == found.chosen.candidate.key:
        return None
    directory = model_directory(fit, uniform)
    if not directory.is_dir():
        fit.notify("writing the plain plan beside it")
        fit.form.write(uniform.candidate, directory, None)
    verified = _verify(fit, directory, "uniform", uniform.candidate.key)
    shutil.rmtree(directory, ignore_errors=True)
    return verified


def _whole(fit: Ongoing) -> int:
    """What a process with the original takes."""
    return fit.allowance.account.total_bytes + fit.allowance.runtime_bytes


def rows_of(fit: Ongoing, found: Found, original: Quality) -> tuple[Row, ...]:
    """The table: before, uniform, chosen."""
    verified = _verify_all(fit, found)
    uniform, chosen = found.uniform, found.chosen
    return (
        _row(fit, "before", "", None, verified["before"], original),
        _row(fit, "uniform", uniform.candidate.label, uniform, verified["uniform"], uniform.quality),
        _row(fit, "chosen", chosen.candidate.label, chosen, verified["chosen"], chosen.quality),
    )


def _row(
    fit: Ongoing,
    name: str,
    label: str,
    measured: Measured | None,
    verified: Verified,
    quality: Quality,
) -> Row:
    account, weights = fit.allowance.account, fit.allowance.account.weights_bytes
    if measured is not None:
        weights = fit.form.weights_bytes(measured.candidate)
    return Row(
        name=name,
        label=label,
        weights_bytes=verified.weights_bytes or weights,
        accounted_bytes=verified.accounted_bytes
        or (account.total_bytes if measured is None else measured.account_bytes),
        active_bytes=fit.allowance.active_bytes if measured is None else measured.active_bytes,
        quality=quality,
        tokens_per_second=verified.tokens_per_second,
        peak_bytes=verified.peak_bytes,
        note=verified.note,
    )
