"""What clients are told where nothing could be answered."""

from __future__ import annotations

import math

from mixtura.errors import BudgetError, one_line
from mixtura.serving.api.refusals import ApiError, refusal_of
from mixtura.serving.gateway.books import LedgerError
from mixtura.serving.gateway.trying import Failure, UnansweredError
from mixtura.types.asking import Outcome

_WORDS: dict[Outcome, str] = {
    "rate": "takes no more requests just now",
    "auth": "refuses the gateway's key",
    "quota": "has no credit left",
    "timeout": "did not answer in time",
    "broken": "gave no usable answer",
    "down": "cannot be reached",
    "refused": "refused the request",
    "budget": "may cost more than this key has left",
    "cancelled": "was given up",
}


def told(error: Exception) -> ApiError:
    """What to say of an error."""
    if isinstance(error, UnansweredError):
        return _unanswered(error)
    if isinstance(error, LedgerError):
        return ApiError(one_line(error), status=503, code="ledger", retry_after_s=1)
    if isinstance(error, BudgetError):
        return _over_budget()
    return refusal_of(error)


def _over_budget(words: str = "") -> ApiError:
    why = (
        words
        or "the dearest possible answer costs more than is left; give a smaller max_tokens or a larger budget"
    )
    return ApiError(f"the budget of this key does not allow it: {why}", status=402, code="insufficient_quota")


def _unanswered(error: UnansweredError) -> ApiError:
    failures = error.failures
    kinds = {one.outcome for one in failures.values()}
    if kinds == {"budget"}:
        return _over_budget(next((one.words for one in failures.values() if one.words), ""))
    refused = [(model, one.words) for model, one in failures.items() if one.outcome == "refused"]
    if refused and kinds <= {"refused", "budget"}:
        model, words = refused[0]
        return ApiError(
            one_line(f"{model} refused the request{': ' if words else ''}{words}", 700), code="refused"
        )
    said = "; ".join(f"{model} {_WORDS.get(one.outcome, one.outcome)}" for model, one in failures.items())
    waits = [one.after_s for one in failures.values() if one.after_s is not None]
    after = max(1, math.ceil(min(waits))) if waits else None
    return ApiError(one_line(said), status=_status(failures), code="no_answer", retry_after_s=after)


def _status(failures: dict[str, Failure]) -> int:
    kinds = {one.outcome for one in failures.values()} - {"budget", "refused"}
    if kinds == {"rate"}:
        return 429
    if kinds == {"timeout"}:
        return 504
    if kinds == {"down"}:
        return 503
    return 502
