"""The package gguf, which knows the container and llama.cpp's names; it is optional."""

from __future__ import annotations

import importlib
from typing import Any

from mixtura.errors import UserError


def gguf_package() -> Any:
    """The package gguf.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError(
            "GGUF files are written with the package gguf, which is not installed; "
            "give: pip install 'mixtura[gguf]'"
        ) from None
