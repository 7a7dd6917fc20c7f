"""The forms there are, by the name of their format."""

from __future__ import annotations

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.errors import UnknownNameError
from mixtura.fitting.forms.base import Form
from mixtura.fitting.forms.experts import ExpertsForm
from mixtura.fitting.forms.gguf.form import GgufForm
from mixtura.fitting.records import Request

FORMS: dict[str, type[Form]] = {"mixtura": ExpertsForm, "gguf": GgufForm}


def form_of(request: Request, view: CheckpointView) -> Form:
    """The form that a request asks for.

    Raises:
        UnknownNameError: there is no format of that name.
    """
    if request.form not in FORMS:
        raise UnknownNameError("format", request.form, FORMS)
    return FORMS[request.form](request, view)
