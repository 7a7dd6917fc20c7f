"""Several sizes of one model from one set of measurements: what does not depend on a budget is done once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.errors import SettingError
from mixtura.fitting.clock import Notify
from mixtura.fitting.forms.known import form_of
from mixtura.fitting.ongoing import work_directory
from mixtura.fitting.records import Request
from mixtura.fitting.result import Fitted
from mixtura.fitting.run import check_out, check_smallest, fit


def several(request: Request, sizes: Sequence[str], budgets: Sequence[Request]) -> list[Request]:
    """A request for each of several budgets, with places named after them.

    Args:
        request: what is asked of all of them; its ``out`` is how the places' names begin.
        sizes: the budgets as the user wrote them.
        budgets: the request with each of the budgets.

    Raises:
        SettingError: two of them are the same.
    """
    if len(set(sizes)) < len(sizes):
        raise SettingError(f"of several budgets each must be another one, got {', '.join(sizes)}")
    work = work_directory(request)
    return [
        replace(one, out=request.out.with_name(f"{request.out.name}-{size}"), work=work)
        for size, one in zip(sizes, budgets, strict=True)
    ]


def fit_several(requests: Sequence[Request], notify: Notify = lambda _: None) -> Iterator[Fitted | None]:
    """Make a model fit each of several budgets; observing and pricing it is done once.

    What is impossible for one of them is said before any is begun. Interrupted, the same call goes on: sizes
    that it has made stay.

    Args:
        requests: from `several`.
        notify: told in a few words what is being done.

    Yields:
        What came of each, in order; None for one that was made before the interruption.

    Raises:
        UserError: one of them cannot be.
    """
    work = work_directory(requests[0])
    made = work.with_name(work.name + "-made")
    waiting = [request for request in requests if not _is_made(request, made)]
    for request in waiting:
        check_out(request)
        allowed = form_of(request, open_checkpoint(request.model)).allowance()
        if allowed.account.total_bytes > allowed.model_budget_bytes:
            check_smallest(allowed)
    for request in requests:
        if request not in waiting:
            yield None
            continue
        notify(f"making {request.out.name}")
        fitted = fit(request, notify, keep_work=True)
        made.mkdir(exist_ok=True)
        (made / request.out.name).touch()
        yield fitted
    for directory in (work, made):
        shutil.rmtree(directory, ignore_errors=True)


def _is_made(request: Request, made: Path) -> bool:
    """Whether an interrupted call has made this size."""
    return (made / request.out.name).exists() and request.out.is_dir()
