"""Learning as one step: it is done whole, or the estimator is what it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

# By which estimators learn, where they have it.
LEARNS = ("fit", "partial_fit", "transfer", "adapt")


@contextmanager
def with_gradients() -> Iterator[None]:
    """Let steps of gradient be taken, whatever the caller switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def whole(learn: Callable[..., Any]) -> Callable[..., Any]:
    """A way to learn that leaves an estimator as it was where it raises.

    Or a refused `fit` would leave widths and means of the new rows beside the old network, or make an
    estimator that learned nothing look as if it had.
    """

    @wraps(learn)
    def learned_or_not(self: Any, *args: Any, **given: Any) -> Any:
        before = dict(vars(self))
        try:
            with with_gradients():
                return learn(self, *args, **given)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    return learned_or_not
