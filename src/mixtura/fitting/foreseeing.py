"""What a fit would take, whatever it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from mixtura.errors import UnknownNameError
from mixtura.fitting.estimate import Estimate, estimate_experts
from mixtura.fitting.forms.gguf.estimate import estimate_file
from mixtura.fitting.records import Request

_ESTIMATES: Final[Mapping[str, Callable[[Request], Estimate]]] = {
    "mixtura": estimate_experts,
    "gguf": estimate_file,
}


def estimate_fit(request: Request) -> Estimate:
    """Predict time, bytes, disk and memory of a fit; runs one layer of the model for a moment.

    Raises:
        UnknownNameError: there is no format of that name.
        UserError: the model, its text or the budget cannot be worked with.
    """
    if request.form not in _ESTIMATES:
        raise UnknownNameError("format", request.form, _ESTIMATES)
    return _ESTIMATES[request.form](request)
