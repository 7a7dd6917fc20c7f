"""What another router would have reached, from the log of one that drew at random with known propensities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from mixtura.errors import UserError
from mixtura.types.models import Decision, Outcome

_NORMAL: Final = 1.96
# Below so many effective outcomes an interval says nothing that can be trusted.
LEAST_EFFECTIVE: Final = 30


@final
@dataclass(frozen=True, slots=True)
class PolicyValue:
    """An estimate of a policy's mean score.

    Attributes:
        value: the estimate.
        low, high: its 95 % interval, by the normal approximation.
        effective: the number of outcomes under the policy itself that would say as much.
        num_outcomes: of the log.
    """

    value: float
    low: float
    high: float
    effective: float
    num_outcomes: int


def off_policy(
    log: Sequence[Outcome],
    decisions: Sequence[Decision],
    expected: Mapping[tuple[str, str], float] | None = None,
) -> Mapping[str, PolicyValue]:
    """Estimate what a policy would have reached on the prompts of a log.

    ``ips`` weights each outcome by how much more probable the policy makes it; unbiased where the logging
    policy gave every model that the policy chooses a chance. ``snips`` divides by the sum of the weights: a
    little biased, much less noisy. ``dr`` starts from expected scores and weights only what differs from
    them: unbiased, and precise where they are good.

    Args:
        log: outcomes with a score and the propensity of the model that was asked.
        decisions: of the policy, one a prompt of the log.
        expected: the score of each prompt and model, by a model that did not learn from this log; without
            it there is no ``dr``.

    Raises:
        UserError: an outcome has no propensity or score, or a prompt no decision; or the policy gives a
            model that was asked no chance anywhere.
    """
    made = {one.prompt: one for one in decisions}
    weights, scores, models, corrections = [], [], [], []
    for number, one in enumerate(log, start=1):
        if one.score is None or one.propensity is None:
            lacking = "score" if one.score is None else "propensity"
            raise UserError(f"outcome {number} of the log has no {lacking}; log it when the model is chosen")
        if not 0 < one.propensity <= 1:
            raise UserError(
                f"outcome {number} of the log has the propensity {one.propensity}; it must be in (0, 1]"
            )
        if one.prompt not in made:
            raise UserError(f"there is no decision for the prompt {one.prompt!r} of the log")
        shares = made[one.prompt].propensities
        weight = shares.get(one.model, 0.0) / one.propensity
        weights.append(weight)
        scores.append(one.score)
        if expected is not None:
            models.append(sum(share * expected[one.prompt, name] for name, share in shares.items()))
            corrections.append(weight * (one.score - expected.get((one.prompt, one.model), 0.0)))
    return _estimates(np.array(weights), np.array(scores), np.array(models), np.array(corrections))


def _estimates(
    weights: np.ndarray, scores: np.ndarray, models: np.ndarray, corrections: np.ndarray
) -> dict[str, PolicyValue]:
    if not len(weights) or weights.sum() == 0:
        raise UserError("the log holds no outcome of a model that the policy would choose; explore more")
    effective = float(weights.sum() ** 2 / (weights**2).sum())
    found = {"ips": _value(weights * scores, effective)}
    mean = float((weights * scores).sum() / weights.sum())
    # The delta method: what each outcome moves the ratio by.
    found["snips"] = _value(mean + weights * (scores - mean) / weights.mean(), effective)
    if len(models):
        found["dr"] = _value(models + corrections, effective)
    return found


def _value(parts: np.ndarray, effective: float) -> PolicyValue:
    mean = float(parts.mean())
    error = float(parts.std(ddof=1) / len(parts) ** 0.5) if len(parts) > 1 else float("inf")
    return PolicyValue(mean, mean - _NORMAL * error, mean + _NORMAL * error, effective, len(parts))
