"""Rounding experts once, with what the calibration text gave them, and keeping the codes.

While the original runs, each MoE layer's tokens and choices are kept. From these, an expert's inputs and so
the second moments that its quantizer asks for can be made at any time, for any way of storing it, without
running the model again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixtura.checkpoints.packed import MATRICES, MatrixName
from mixtura.checkpoints.rounded import Encodings, RoundedExperts
from mixtura.checkpoints.skeleton import CheckpointView, build
from mixtura.checkpoints.view import LayerView
from mixtura.checkpoints.viewing.headers import TensorFiles, read_header
from mixtura.fitting.calibration import Calibration, Seen, calibrated, side_by_side, uncalibrated
from mixtura.fitting.journal import Journal
from mixtura.fitting.palette import STORED, quantizer_of
from mixtura.kernels import ExpertMath, ExpertTensors
from mixtura.kernels.backend import math_of

_INPUTS = "inputs-{layer}-{part}.safetensors"
_ROUNDED = "rounded"


@final
class Rounder:
    """The experts of a model in fewer bits, each made when it is first asked for.

    Args:
        journal: where tokens and codes are kept.
        layers: the model's MoE layers.
        maths: what their experts compute around their matrices.
    """

    def __init__(self, journal: Journal, layers: Iterable[LayerView], maths: Iterable[ExpertMath]) -> None:
        self.kept = RoundedExperts(journal.path(_ROUNDED))
        self._journal = journal
        self._layers = {layer.index: layer for layer in layers}
        self._maths = dict(zip(self._layers, maths, strict=True))
        self._seen: tuple[int, Seen | None, Tensor | None] = (-1, None, None)

    def remember(self, layer: int, seen: Seen, part: str = "") -> None:
        """Keep what a layer was given.

        Args:
            layer: number of its decoder layer.
            seen: its tokens.
            part: tells these tokens from others of the layer that are kept as well.
        """
        tensors = {
            "hidden": seen.hidden.contiguous(),
            "index": seen.index.contiguous(),
            "weights": seen.weights.contiguous(),
        }

        def save(path: object) -> None:
            save_file(tensors, str(path))

        self._journal.write(_INPUTS.format(layer=layer, part=part), save)
        if self._seen[0] == layer:
            self._seen = (-1, None, None)

    def ensure(self, layer: int, wanted: Mapping[int, Iterable[int]]) -> None:
        """Round experts of a layer, on several threads, unless that has been done.

        Args:
            layer: number of its decoder layer.
            wanted: options by expert.
        """
        missing = {
            expert: [o for o in options if not self.kept.has(STORED[o].action(layer, expert))]
            for expert, options in wanted.items()
        }
        missing = {expert: options for expert, options in missing.items() if options}
        if not missing:
            return
        self._look_at(layer)
        side_by_side(lambda expert: self._round(layer, expert, missing[expert]), missing)

    def decoded(self, layer: int, expert: int, option: int, dtype: torch.dtype) -> ExpertTensors:
        """An expert as it is after rounding, in the layout of its module."""
        self.ensure(layer, {expert: (option,)})
        kept = self.kept.read(STORED[option].action(layer, expert))
        transposed = self._layers[layer].layout.transposed
        up, down = decoded_matrices(kept.encodings, option, dtype, transposed=transposed)
        return ExpertTensors(up, down, kept.biases.get("up"), kept.biases.get("down")).to(dtype)

    def error(self, layer: int, expert: int, option: int) -> tuple[float, float]:
        """Squared error of the expert's weighted outputs on calibration text, and their squares."""
        facts = self.kept.facts(STORED[option].action(layer, expert))
        return float(facts["error"]), float(facts["whole"])

    def _look_at(self, layer: int) -> None:
        """Read what a layer was given, in place of the one before."""
        if self._seen[0] == layer:
            return
        paths = sorted(self._journal.directory.glob(_INPUTS.format(layer=layer, part="*")))
        seen, average = None, None
        if paths:
            files = [TensorFiles(read_header(path)) for path in paths]
            names = ("hidden", "index", "weights")
            seen = Seen(*(torch.cat([one.read(name) for one in files]) for name in names))
            average = seen.average
        self._seen = (layer, seen, average)

    @torch.no_grad()
    def _round(self, layer: int, expert: int, options: Sequence[int]) -> None:
        view, math = self._layers[layer], self._maths[layer]
        view.check_finite([expert])
        tensors = view.native_expert(expert)
        transposed = view.layout.transposed
        calibration = self._calibration(layer, expert, tensors)
        biases: dict[MatrixName, Tensor] = {}
        if tensors.up_bias is not None:
            biases["up"] = tensors.up_bias
        if tensors.down_bias is not None:
            biases["down"] = tensors.down_bias
        up, down = ((m.mT if transposed else m).contiguous() for m in (tensors.up, tensors.down))
        # One matrix in all ways, and then the other: what its moments are turned into is made once.
        ups = {option: quantizer_of(option).encode(up, calibration.up_moments) for option in options}
        downs = {option: quantizer_of(option).encode(down, calibration.down_moments) for option in options}
        whole = calibration.whole
        for option in options:
            encodings: Encodings = {"up": ups[option], "down": downs[option]}
            # As the model would hold it, and then as wide as the outputs it is compared with.
            up, down = decoded_matrices(encodings, option, tensors.up.dtype, transposed=transposed)
            error = calibration.error(math, tensors._replace(up=up, down=down))
            facts = {"error": error, "whole": whole}
            self.kept.write(STORED[option].action(layer, expert), encodings, facts, biases)

    def _calibration(self, layer: int, expert: int, tensors: ExpertTensors) -> Calibration:
        """What an expert was given and what it makes of that."""
        _, seen, average = self._seen
        if seen is None or average is None:
            return uncalibrated(self._layers[layer].shape.d_model)
        return calibrated(seen, average, (expert,), tensors, self._maths[layer])


def rounder_for(view: CheckpointView, journal: Journal) -> Rounder:
    """The rounder of a checkpoint's experts."""
    model = build(view)
    modules: list[Any] = [model.get_submodule(layer.name) for layer in view.layers]
    return Rounder(journal, view.layers, map(math_of, modules))


def decoded_matrices(
    encodings: Encodings, option: int, dtype: torch.dtype, *, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Both matrices of an expert decoded, in the layout of its module."""
    quantizer = quantizer_of(option)
    up, down = (quantizer.decode(encodings[matrix], dtype) for matrix in MATRICES)
    return (up.mT, down.mT) if transposed else (up, down)
