"""Experts that were rounded with the help of calibration text, kept for whoever tries or writes them.

A directory with a safetensors file for every expert and way of storing it. A file is there whole or not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixtura.checkpoints.packed import MATRICES, MatrixName
from mixtura.checkpoints.viewing.headers import TensorFiles, read_header
from mixtura.errors import CheckpointError
from mixtura.methods.quantizers import Encoded
from mixtura.types import Quantize

_METAS, _FACTS = "metas", "facts"
_BIAS = "bias"
# Both matrices of one expert as one quantizer stores them.
Encodings = Mapping[MatrixName, Encoded]


@final
class RoundedExpert(NamedTuple):
    """One expert as it was rounded."""

    encodings: Encodings
    biases: Mapping[MatrixName, Tensor]


@final
@dataclass(frozen=True, slots=True)
class RoundedExperts:
    """Such a directory. It need not be there before something is written."""

    directory: Path

    def has(self, action: Quantize) -> bool:
        """Whether an expert is there as an action stores it."""
        return self._path(action).is_file()

    def write(
        self,
        action: Quantize,
        encodings: Encodings,
        facts: Mapping[str, Any],
        biases: Mapping[MatrixName, Tensor],
    ) -> None:
        """Keep an expert as an action stores it, JSON values with it, and what biases it has."""
        tensors = {
            f"{matrix}.{part}": tensor
            for matrix in MATRICES
            for part, tensor in encodings[matrix].tensors.items()
        }
        tensors |= {f"{_BIAS}.{matrix}": bias.contiguous() for matrix, bias in biases.items()}
        metas = {matrix: encodings[matrix].meta for matrix in MATRICES}
        path = self._path(action)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".aside")
        save_file(tensors, str(aside), {_METAS: json.dumps(metas), _FACTS: json.dumps(dict(facts))})
        os.replace(aside, path)

    def facts(self, action: Quantize) -> dict[str, Any]:
        """What was kept with an expert."""
        found: dict[str, Any] = self._metadata(action)[_FACTS]
        return found

    def read(self, action: Quantize) -> RoundedExpert:
        """An expert as an action stores it, which must be here.

        Raises:
            CheckpointError: the file is damaged.
        """
        metas = self._metadata(action)[_METAS]
        files = TensorFiles(read_header(self._path(action)))
        biases = _parts(files, _BIAS)
        return RoundedExpert(
            {matrix: Encoded(_parts(files, matrix), metas[matrix]) for matrix in MATRICES},
            {matrix: biases[matrix] for matrix in MATRICES if matrix in biases},
        )

    def matrix(self, action: Quantize, matrix: MatrixName) -> Encoded | None:
        """One matrix of an expert as an action stores it; None where the expert is not here.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not self.has(action):
            return None
        metas = self._metadata(action)[_METAS]
        return Encoded(_parts(TensorFiles(read_header(self._path(action))), matrix), metas[matrix])

    def _metadata(self, action: Quantize) -> dict[str, Any]:
        path = self._path(action)
        with safe_open(str(path), framework="pt") as file:
            found = file.metadata() or {}
        if not {_METAS, _FACTS} <= set(found):
            raise CheckpointError(f"{path} does not hold a rounded expert; remove it to round it again")
        return {name: json.loads(found[name]) for name in (_METAS, _FACTS)}

    def _path(self, action: Quantize) -> Path:
        settings = json.dumps(action.settings, sort_keys=True)
        name = re.sub(r"[^\w.]+", "-", f"{action.quantizer} {settings}").strip("-")
        return self.directory / f"{action.layer}" / f"{action.expert}-{name}.safetensors"


def _parts(files: TensorFiles, owner: str) -> dict[str, Tensor]:
    """Tensors of a file whose names begin so, by the rest of the name."""
    names = (name for name in files.entries if name.startswith(f"{owner}."))
    return {name.removeprefix(f"{owner}."): files.read(name) for name in names}
