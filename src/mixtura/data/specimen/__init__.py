"""The specimen: a small, really trained MoE model that ships inside the package."""

from __future__ import annotations

from pathlib import Path

from mixtura.errors import CheckpointError

MODEL = Path(__file__).with_name("model")


def path() -> Path:
    """The directory of the shipped model, an ordinary transformers checkpoint.

    Raises:
        CheckpointError: where this installation lacks it.
    """
    if not (MODEL / "config.json").is_file() or not list(MODEL.glob("*.safetensors")):
        raise CheckpointError(
            f"the specimen is not in {MODEL}; reinstall mixtura, or train it with 'make specimen'"
        )
    return MODEL
