"""What a saved estimator's file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtura.errors import CheckpointError, one_line

FORMAT = "mixtura-estimator-1"


def from_json(value: Any) -> Any:
    """What a saved fact was: an array of words lies as a list with its dtype."""
    if isinstance(value, dict):
        return np.array(value["array"], dtype=value["dtype"])
    return value


def read_saved(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The arrays and the facts of a saved estimator.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            words = json.loads((file.metadata() or {}).get("mixtura", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} as an estimator: {one_line(error)}") from None
    if not isinstance(words, dict) or words.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no estimator of mixtura; give a file that `save` wrote")
    return tensors, words
