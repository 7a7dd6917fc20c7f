"""What every option of every expert would cost, measured while the original model runs once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.view import LayerView
from mixtura.checkpoints.viewing.droppable import least_kept
from mixtura.errors import CheckpointError
from mixtura.fitting.calibration import Seen
from mixtura.fitting.palette import DROP, KEEP, OPTIONS, STORED, WAYS, quantizer_of
from mixtura.fitting.records import Parts, Prices
from mixtura.fitting.rounding import Rounder
from mixtura.methods import create

_ALIGNMENT = 64
STATISTIC = "weighted_output_norm"


@final
class LayerPricer:
    """Adds up, for one layer, the error each option makes on the tokens really routed to each expert.

    An `mixtura.kernels.AssignmentObserver`. The error of an assignment is the squared distance
    between what the expert adds to the layer's output and what it would add under the option.

    Args:
        layer: the layer.
        rounder: makes experts in fewer bits, and keeps them.
        num_priced: experts that are rounded under every option, spread evenly; all if not given. The
            others' errors are taken to be the same share of their outputs.
        options: ways of storing that are priced.
    """

    def __init__(
        self,
        layer: LayerView,
        rounder: Rounder,
        num_priced: int | None = None,
        options: Sequence[int] = tuple(STORED),
    ) -> None:
        self.layer = layer
        self.options = tuple(options)
        self._rounder = rounder
        self._statistic = create("statistics", STATISTIC)
        # Which part of the text runs, and whether others follow: experts are rounded by all of them.
        self.part, self.is_last = "", True
        self.price_only(num_priced)
        self.sums = np.zeros((layer.num_experts, len(OPTIONS)))
        # Squared outputs of the rows that were run again.
        self.compared = np.zeros(layer.num_experts)
        self.importance = np.zeros(layer.num_experts)
        self.load = np.zeros(layer.num_experts, dtype=np.int64)
        self.weights = np.zeros(layer.num_experts)
        self.num_tokens = np.zeros(1, dtype=np.int64)

    def price_only(self, num_priced: int | None) -> None:
        """Run so many experts again from now on."""
        num_experts = self.layer.num_experts
        step = 1 if num_priced is None else max(1, num_experts // num_priced)
        self._priced = range(0, num_experts, step)

    def start(
        self,
        hidden: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> None:
        """Count the tokens that have any expert, and keep what experts are rounded by."""
        present = (top_k_index >= 0) & (top_k_index < self.layer.num_experts)
        seen = Seen(hidden, top_k_index.masked_fill(~present, -1), top_k_weights)
        self._rounder.remember(self.layer.index, seen, self.part)
        self.num_tokens += int(present.any(-1).sum())

    @torch.no_grad()
    def expert(
        self,
        expert: int,
        token_ids: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        inputs: Float[Tensor, "n D"],
        outputs: Float[Tensor, "n D"],
    ) -> None:
        """Add up what the expert puts out."""
        if token_ids.numel() == 0:
            return
        squares = weights.double().square()
        whole = float((squares * outputs.float().square().sum(-1)).sum())
        self.sums[expert, DROP] += whole
        self.importance[expert] += float(self._statistic.measure(inputs, outputs, weights).double().sum())
        self.load[expert] += token_ids.numel()
        self.weights[expert] += float(weights.double().sum())

    def finish(self) -> None:
        """Round the experts that are to be priced, after the last part; refuse outputs that are no numbers.

        Raises:
            CheckpointError: the sums became NaN or infinite.
        """
        index = self.layer.index
        priced = [expert for expert in self._priced if self.load[expert]] if self.is_last else []
        self._rounder.ensure(index, dict.fromkeys(priced, self.options))
        for expert in priced:
            for option in self.options:
                self.sums[expert, option], self.compared[expert] = self._rounder.error(index, expert, option)
        if not (np.isfinite(self.sums).all() and np.isfinite(self.importance).all()):
            raise CheckpointError(
                f"the outputs or routing weights of layer {self.layer.index} became NaN or infinite; the "
                f"checkpoint is damaged, or its dtype cannot hold its activations: download it again or use "
                f"float32"
            )

    def snapshot(self) -> dict[str, Any]:
        """Everything added up so far, by name; `restore` takes it back to the last bit."""
        return {name: getattr(self, name).copy() for name in _SUMS}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from what `snapshot` gave."""
        for name in _SUMS:
            setattr(self, name, snapshot[name].copy())

    def errors(self, usual: Float[ndarray, " O"]) -> Float[ndarray, "E O"]:
        """Errors of all assignments added up, for every expert.

        Args:
            usual: error of each option as a share of the output, for a layer none of whose experts was
                run again.
        """
        compared = self.compared.sum()
        shares = self.sums.sum(0) / compared if compared > 0 else usual
        found = self.sums.copy()
        for expert in range(self.layer.num_experts):
            whole, seen = self.sums[expert, DROP], self.compared[expert]
            if seen == whole:
                continue
            own = self.sums[expert] / seen if seen > 0 else shares
            found[expert, :DROP] = (own * whole)[:DROP]
        return found


_SUMS = ("sums", "compared", "importance", "load", "weights", "num_tokens")


def collect_prices(pricers: Sequence[LayerPricer], keep_dtype: torch.dtype | None = None) -> Prices:
    """The prices of all layers together.

    An expert seen rarely is priced with one more assignment of the layer's average error, so that
    one that calibration text never reached is not free to ruin. A layer that was not reached at all is
    taken to be like the average of the others.
    """
    layers, errors, sizes, loads = [], [], [], []
    usual = _usual_shares(pricers)
    for pricer in pricers:
        sums, load = pricer.errors(usual), pricer.load
        average = sums.sum(0) / max(int(load.sum()), 1)
        errors.append((sums + average) / max(int(pricer.num_tokens[0]), 1))
        row = option_bytes(pricer.layer, keep_dtype)
        sizes.append(np.tile(row, (pricer.layer.num_experts, 1)))
        layers.append(pricer.layer)
        loads.append(load)
    reached = [number for number, pricer in enumerate(pricers) if pricer.num_tokens[0]]
    for number, pricer in enumerate(pricers):
        if not pricer.num_tokens[0]:
            like = [errors[other].mean(0) for other in reached] or [usual]
            errors[number] = np.tile(np.mean(like, axis=0), (pricer.layer.num_experts, 1))
    untried = [option for option in STORED if option not in pricers[0].options]
    for of_layer in errors:
        of_layer[:, untried] = np.inf
    return Prices(
        parts=experts_of(layers),
        num_bytes=np.concatenate(sizes),
        errors=np.concatenate(errors),
        load=np.concatenate(loads),
        weights=np.concatenate([pricer.weights for pricer in pricers]),
    )


def collect_importance(pricers: Sequence[LayerPricer]) -> Float[ndarray, " M"]:
    """How much each expert matters: the mean of routing weight times output norm (REAP's score)."""
    return np.concatenate([pricer.importance / np.maximum(pricer.load, 1) for pricer in pricers])


def _usual_shares(pricers: Sequence[LayerPricer]) -> Float[ndarray, " O"]:
    """Error of each option as a share of the output, over all layers."""
    compared = sum(float(pricer.compared.sum()) for pricer in pricers)
    if compared > 0:
        shares: Float[ndarray, " O"] = np.sum([pricer.sums.sum(0) for pricer in pricers], axis=0) / compared
    else:
        # Squared steps of the widths' levels, as rounding makes them where the weights are of one size.
        shares = np.array([0.0, *((2.0 / 2**bits) ** 2 for bits in (way.bits for way in WAYS)), 1.0])
    shares[DROP] = 1.0
    return shares


def experts_of(layers: Sequence[LayerView]) -> Parts:
    """The experts of all MoE layers in one row."""
    return Parts(
        layers=np.repeat([layer.index for layer in layers], [layer.num_experts for layer in layers]),
        numbers=np.concatenate([np.arange(layer.num_experts) for layer in layers]),
        top_k={layer.index: layer.top_k for layer in layers},
        num_groups={layer.index: layer.num_groups for layer in layers},
        least_kept={layer.index: least_kept(layer) for layer in layers},
    )


def option_bytes(layer: LayerView, keep_dtype: torch.dtype | None = None) -> Int[np.ndarray, " O"]:
    """Bytes one expert of a layer takes under each option, in memory and on disk.

    ``keep_dtype`` is the dtype an unchanged expert is held in; the stored one if not given.
    """
    tensors = layer.native_expert(0)
    matrices = [m.mT if layer.layout.transposed else m for m in (tensors.up, tensors.down)]
    biases = [b for b in (tensors.up_bias, tensors.down_bias) if b is not None]

    def dense(tensor: Tensor) -> int:
        return tensor.numel() * (keep_dtype or tensor.dtype).itemsize

    bias_bytes = sum(dense(bias) for bias in biases)
    sizes = np.zeros(len(OPTIONS), dtype=np.int64)
    # A packed expert's tensors (codes and scales of two matrices) are each aligned in memory.
    sizes[KEEP] = sum(dense(matrix) for matrix in matrices) + bias_bytes + 2 * _ALIGNMENT
    for option in STORED:
        quantizer = quantizer_of(option)
        codes = sum(quantizer.num_bytes(*matrix.shape) for matrix in matrices)
        sizes[option] = codes + bias_bytes + 2 * len(matrices) * _ALIGNMENT
    return sizes


def uniform_bytes(view: CheckpointView) -> dict[int, int]:
    """Bytes of all experts stored in one way, by option."""
    sizes = [layer.num_experts * option_bytes(layer) for layer in view.layers]
    return {option: int(sum(size[option] for size in sizes)) for option in STORED}


def save_prices(prices: Prices, importance: Float[ndarray, " M"], path: Path) -> None:
    """Write prices and importances as one safetensors file."""
    arrays: dict[str, Any] = {
        "layers": prices.parts.layers,
        "numbers": prices.parts.numbers,
        "top_k": np.array(list(prices.parts.top_k.items())),
        "num_groups": np.array(list(prices.parts.num_groups.items())),
        "least_kept": np.array(list(prices.parts.least_kept.items())),
        "num_bytes": prices.num_bytes,
        "errors": prices.errors,
        "load": prices.load,
        "importance": importance,
    }
    arrays |= {} if prices.weights is None else {"weights": prices.weights}
    save_file(arrays, str(path))


def load_prices(path: Path) -> tuple[Prices, Float[ndarray, " M"]]:
    """Read what `save_prices` wrote."""
    arrays = load_file(str(path))

    def by_layer(name: str) -> dict[int, int]:
        return {int(layer): int(value) for layer, value in arrays[name]}

    experts = Parts(
        arrays["layers"],
        arrays["numbers"],
        by_layer("top_k"),
        by_layer("num_groups"),
        by_layer("least_kept"),
    )
    numbers = (arrays["num_bytes"], arrays["errors"], arrays["load"])
    prices = Prices(experts, *numbers, weights=arrays.get("weights"))
    return prices, arrays["importance"]
