"""``experts.json`` of a checkpoint of the mixtura format: what it holds in fewer bits, and how.

The version is 2 where matrices outside the experts are in fewer bits, and 1 otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from mixtura.checkpoints.packed import EXPERTS_FILE, MATRICES, ExpertRecord, LayerRecord, MatrixRecord
from mixtura.errors import CheckpointError, UserError

_FORMAT_VERSION, _WITHOUT_MATRICES = 2, 1


@final
@dataclass(frozen=True, slots=True)
class Contents:
    """What ``experts.json`` says.

    Attributes:
        layers: the MoE layers.
        matrices: matrices outside the experts that are in fewer bits, by the name of the tensor on disk.
    """

    layers: tuple[LayerRecord, ...]
    matrices: Mapping[str, MatrixRecord] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Of the format: the lowest that has what is in it."""
        return _FORMAT_VERSION if self.matrices else _WITHOUT_MATRICES

    def to_json(self) -> str:
        """``experts.json`` as text, the same bytes for the same records."""
        values: dict[str, Any] = {
            "version": self.version,
            "layers": {
                layer.name: {
                    "index": layer.index,
                    "kept": list(layer.kept),
                    "experts": None if layer.experts is None else [e.to_dict() for e in layer.experts],
                    **({} if layer.shared is None else {"shared": list(layer.shared)}),
                }
                for layer in self.layers
            },
        }
        if self.matrices:
            values["matrices"] = {name: record.to_dict() for name, record in self.matrices.items()}
        return json.dumps(values, sort_keys=True, separators=(",", ":")) + "\n"

    @staticmethod
    def from_json(text: str) -> Contents:
        """What `to_json` wrote, layers in order.

        Raises:
            CheckpointError: the text is not an ``experts.json`` of a version that is known.
        """
        try:
            values = json.loads(text)
            if values["version"] not in (_WITHOUT_MATRICES, _FORMAT_VERSION):
                raise CheckpointError(
                    f"{EXPERTS_FILE} is of version {values['version']} but this mixtura reads up to "
                    f"{_FORMAT_VERSION}; use the mixtura that wrote it or write it again"
                )
            layers = [_layer_from_dict(name, layer) for name, layer in values["layers"].items()]
            found = values.get("matrices", {}).items()
            matrices = {name: MatrixRecord.from_dict(record) for name, record in found}
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{EXPERTS_FILE} cannot be read ({error!r}); write the model again"
            ) from None
        return Contents(tuple(sorted(layers, key=lambda layer: layer.index)), matrices)


def read_experts_file(directory: Path) -> Contents:
    """What a checkpoint of the mixtura format says of its experts and matrices.

    Raises:
        CheckpointError: there is no ``experts.json`` or it cannot be read.
    """
    path = directory / EXPERTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {EXPERTS_FILE}, so it is not of the mixtura format")
    return Contents.from_json(path.read_text(encoding="utf-8", errors="replace"))


def _layer_from_dict(name: str, values: Mapping[str, Any]) -> LayerRecord:
    experts = values["experts"]
    read = None if experts is None else tuple(map(_expert_from_dict, experts))
    shared = values.get("shared")
    shared = None if shared is None else tuple(shared)
    return LayerRecord(int(values["index"]), name, tuple(values["kept"]), read, shared)


def _expert_from_dict(expert: Mapping[str, Any]) -> ExpertRecord:
    up, down = (MatrixRecord.from_dict(expert[matrix]) for matrix in MATRICES)
    return ExpertRecord(up, down, bool(expert["has_bias"]))
