"""What compressed-tensors calls a scheme, and which checkpoints have just one for their experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from mixtura.checkpoints.packed import ExpertRecord, MatrixRecord
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.viewing.packed import PackedLayer
from mixtura.errors import SettingError, UnsupportedModelError, counted_names
from mixtura.types import Quantize

QUANTIZER = "integers"
_METHOD, _FORMAT = "compressed-tensors", "pack-quantized"
_ADVICE = (
    "give --bits, and the experts are rounded to such integers from here, or use `mixtura compress` with "
    f"--quantize {QUANTIZER} on the original"
)
# The widths and groups for which vLLM has kernels for experts.
_VLLM_BITS, _VLLM_GROUPS = (4, 8), (0, 32, 64, 128)


@final
@dataclass(frozen=True, slots=True)
class Scheme:
    """Symmetric integers of so many bits, a scale for each group; ``group_size`` 0 is a scale a row."""

    bits: int
    group_size: int

    @property
    def settings(self) -> dict[str, Any]:
        """Of the quantizer that makes such codes."""
        return {"bits": self.bits, "group_size": self.group_size}

    @property
    def runs_in_vllm(self) -> bool:
        """Whether vLLM has kernels for experts so."""
        return self.bits in _VLLM_BITS and self.group_size in _VLLM_GROUPS

    def action(self, layer: int, expert: int) -> Quantize:
        """Rounding an expert so, as part of a plan."""
        return Quantize(layer, expert, QUANTIZER, self.settings)

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any]:
        """``quantization_config`` for ``config.json``; ``ignored`` are modules that are not so."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if self.group_size else "channel",
            "group_size": self.group_size or None,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": None,
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": _FORMAT,
        }
        return {
            "quant_method": _METHOD,
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def stored_scheme(view: CheckpointView) -> Scheme:
    """The scheme in which a checkpoint stores all its experts.

    Raises:
        UnsupportedModelError: they are not all integers of one width and one size of groups; says which.
    """
    found: dict[Scheme, list[int]] = {}
    for layer in view.layers:
        if not isinstance(layer, PackedLayer):
            raise UnsupportedModelError(
                f"the experts of layer {layer.index} are stored whole, not in fewer bits; {_ADVICE}"
            )
        records = layer.record.experts or ()
        for expert, record in enumerate(records):
            found.setdefault(_scheme_of(layer.index, expert, record), []).append(layer.index)
    if len(found) > 1:
        told = "; ".join(
            f"{one.bits} bits in groups of {one.group_size} in layers "
            f"{counted_names([str(index) for index in dict.fromkeys(layers)])}"
            for one, layers in found.items()
        )
        raise UnsupportedModelError(
            f"experts are stored in several ways ({told}), and transformers reads one for all experts of a "
            f"model; {_ADVICE}"
        )
    return next(iter(found))


def _scheme_of(layer: int, expert: int, record: ExpertRecord) -> Scheme:
    schemes = set()
    for matrix in (record.up, record.down):
        if matrix.quantizer != QUANTIZER:
            raise UnsupportedModelError(
                f"expert {expert} of layer {layer} is stored by {_way(matrix)}, for which compressed-tensors "
                f"has no codes; {_ADVICE}"
            )
        schemes.add(Scheme(int(matrix.settings["bits"]), int(matrix.settings["group_size"])))
    return schemes.pop()


def _way(matrix: MatrixRecord) -> str:
    if matrix.quantizer is None:
        return str(matrix.meta.get("stored", matrix.dtype))
    settings = ", ".join(f"{name}={value}" for name, value in sorted(matrix.settings.items()))
    return f"{matrix.quantizer} ({settings})"


def check_groups(view: CheckpointView, scheme: Scheme) -> None:
    """Refuse groups that do not divide rows: the format has whole ones only.

    Raises:
        SettingError: names sizes that do.
    """
    if not scheme.group_size:
        return
    widths = {width for layer in view.layers for width in (layer.shape.d_model, layer.shape.d_expert)}
    if all(width % scheme.group_size == 0 for width in widths):
        return
    fitting = [str(n) for n in (128, 64, 32, 16, 8) if all(width % n == 0 for width in widths)][:2]
    raise SettingError(
        f"groups of {scheme.group_size} weights do not divide rows of "
        f"{' and '.join(map(str, sorted(widths)))} weights, and compressed-tensors has "
        f"whole groups only; give a group_size of {' or '.join([*fitting, '0'])} (0: a scale a row)"
    )


def check_plain(view: CheckpointView) -> None:
    """Refuse what the format has no way to say.

    Raises:
        UnsupportedModelError: says what it is.
    """
    counts = {layer.num_experts for layer in view.layers}
    if len(counts) > 1:
        raise UnsupportedModelError(
            f"layers have different numbers of experts ({', '.join(map(str, sorted(counts)))}), and a config "
            f"has one number for all; drop the same number in each, as `mixtura compress --prune` does"
        )
    merged = [
        layer.index
        for layer in view.layers
        if isinstance(layer, PackedLayer) and layer.record.shared is not None
    ]
    if merged:
        raise UnsupportedModelError(
            f"experts of {counted_names([f'layer {index}' for index in merged])} were merged and are chosen "
            f"under several numbers, which no ordinary checkpoint says; use a model of dropped experts"
        )
    if view.raw_config.get("quantization_config"):
        raise UnsupportedModelError(
            "the model is in fewer bits already (quantization_config in its config.json), and a checkpoint "
            "has one such format; give the original in bfloat16"
        )


def check_loads(view: CheckpointView) -> None:
    """Refuse families whose plain weights transformers does not load beside packed ones.

    Where weights outside the experts are cut or joined on loading, its reader of the format drops those that
    have no codes.

    Raises:
        UnsupportedModelError: names one.
    """
    experts = {name for layer in view.layers for name in layer.expert_parameters}
    for name, source in view.sources.items():
        if source.converter is None or name in experts:
            continue
        if all(pattern.endswith(".weight") for pattern in source.converter.source_patterns):
            raise UnsupportedModelError(
                f"transformers makes {name} of {counted_names(source.names)}, which its reader of "
                f"compressed-tensors loses; leave --format out for {view.model_type}"
            )


def ignored_modules(view: CheckpointView, written: Iterator[str]) -> tuple[str, ...]:
    """Modules that are not in fewer bits: what readers would else look for codes of.

    Args:
        view: the checkpoint.
        written: names of tensors outside the experts.
    """
    linear = {name for name, module in view.meta_model.named_modules() if isinstance(module, nn.Linear)}
    stored = {name.removesuffix(".weight") for name in written if name.endswith(".weight")}
    return tuple(sorted(linear | stored))
