"""Why a compiled call cannot run a part of a model: said where that is decided, read by `kernels.paths`."""

from __future__ import annotations

from typing import final


@final
class Declined(Exception):  # noqa: N818
    """A part is left to its own ``forward``, which is no error.

    Its text is the reason: a clause that names the part, such as "its q_proj is a Conv1D".
    """
