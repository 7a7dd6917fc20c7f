"""Verifiers by name or file: what scores texts for decoders that choose among them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from mixtura.errors import UserError
from mixtura.methods.decoders import Verifier

_FUNCTION = "verify"


def verifier_of(path: Path) -> Verifier:
    """The function ``verify(prompt, texts)`` of a Python file.

    Raises:
        UserError: there is no such file, it cannot be imported, or it has no such function.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a .py file with a function verify(prompt, texts)")
    spec = importlib.util.spec_from_file_location(f"mixtura_verifier_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be imported as a Python module; give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"importing {path} failed: {type(error).__name__}: {error}") from error
    found = getattr(module, _FUNCTION, None)
    if not callable(found):
        raise UserError(f"{path} has no function verify(prompt, texts); write one that scores each text")
    verify: Verifier = found
    return verify
