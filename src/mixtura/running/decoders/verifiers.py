"""Verifiers by name or file: what scores texts for decoders that choose among them."""

from __future__ import annotations

from pathlib import Path

from mixtura.errors import UserError
from mixtura.methods import import_file
from mixtura.methods.decoders import Verifier

_FUNCTION = "verify"


def verifier_of(path: Path) -> Verifier:
    """The function ``verify(prompt, texts)`` of a Python file.

    Raises:
        UserError: there is no such file, it cannot be imported, or it has no such function.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a .py file with a function verify(prompt, texts)")
    found = getattr(import_file(path), _FUNCTION, None)
    if not callable(found):
        raise UserError(f"{path} has no function verify(prompt, texts); write one that scores each text")
    verify: Verifier = found
    return verify
