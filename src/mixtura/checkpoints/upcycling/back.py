"""An MoE checkpoint back into a dense one: every layer's experts averaged into one feed-forward part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import mixtura
from mixtura.checkpoints.applying.copying import CopyRows
from mixtura.checkpoints.applying.shards import (
    OutputTensor,
    Sink,
    Unit,
    pack_shards,
    write_text,
)
from mixtura.checkpoints.applying.staging import Staging, Terms, check_place
from mixtura.checkpoints.dense.view import DOWN, GATE, UP, DenseView
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.upcycling.streaming import stream
from mixtura.checkpoints.viewing.base import require_finite
from mixtura.checkpoints.viewing.disk import DiskLayer, DiskView
from mixtura.checkpoints.viewing.reader import compute_dtype
from mixtura.errors import MixturaError, UnsupportedModelError, UserError, suggest

# MoE families without a shared expert, and the dense family that is the same outside the experts.
DENSE_OF: Mapping[str, str] = {"mixtral": "mistral", "qwen3_moe": "qwen3", "flex_olmo": "olmo2"}
_ARCHITECTURES = {"mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM", "olmo2": "Olmo2ForCausalLM"}
# What a config says of experts alone.
_OF_EXPERTS = {
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "decoder_sparse_step",
    "mlp_only_layers", "architectures", "model_type", "intermediate_size", "transformers_version",
}  # fmt: skip
_SUM_TOLERANCE = 1e-6
_SHARD_BYTES = 5 * 10**9


def condense(
    source: Path,
    out: Path,
    *,
    shares: Mapping[int, Sequence[float]] | None = None,
    shard_bytes: int = _SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write the dense model whose feed-forward parts are averages of an MoE model's experts.

    What stands outside the experts goes along byte for byte; routers go. Experts that began as copies of one
    part, as `mixtura.upcycle` makes them, can be averaged after training; others have nothing in common that
    an average would keep. Stopped work is continued by the same call, to the same bytes.

    Args:
        source: the MoE model's directory; only read.
        out: the new directory.
        shares: by decoder layer, the weight of each expert in the average; by default all alike.
        shard_bytes: largest size of a weights file.
        progress: whether to show a progress bar on standard error.

    Returns:
        `out`.

    Raises:
        UnsupportedModelError: no dense family is the same outside the experts.
        UserError: shares are not one for each expert of each layer, or do not sum to one.
        OutputError: `out` exists or cannot be written.
    """
    source, out = Path(source), Path(out)
    check_place(out, source)
    view = DiskView(source)
    config = _config_of(view)
    weights = {layer.index: _shares(layer, shares) for layer in view.layers}
    shards = pack_shards(_units(view, weights), shard_bytes)
    staging = Staging(out, _terms(source, out, weights, shard_bytes))
    own = partial(_write_own_files, source=source, config=config)
    return stream(staging, source, shards, own, progress=progress)


def _config_of(view: DiskView) -> Any:
    """The dense config."""
    from transformers import CONFIG_MAPPING

    family = DENSE_OF.get(view.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"no dense family computes what {view.model_type} does outside its experts, or it has an expert "
            f"that every token visits besides; {', '.join(DENSE_OF)} can be made dense "
            f"({suggest(view.model_type, DENSE_OF)})"
        )
    widths = {layer.shape.d_expert for layer in view.layers}
    if len(widths) != 1 or len(view.layers) != view.config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{view.path} has layers without experts, or experts of the widths {sorted(widths)}; only models "
            "that are alike in all layers can be made dense"
        )
    kept = {key: value for key, value in view.config.to_dict().items() if key not in _OF_EXPERTS}
    made = CONFIG_MAPPING[family](**kept, intermediate_size=widths.pop())
    made.architectures = [_ARCHITECTURES[family]]
    made.dtype = compute_dtype(view.config)
    return made


def _shares(layer: DiskLayer, shares: Mapping[int, Sequence[float]] | None) -> tuple[float, ...]:
    if shares is None:
        return (1.0 / layer.num_experts,) * layer.num_experts
    own = tuple(float(one) for one in shares.get(layer.index, ()))
    if len(own) != layer.num_experts or min(own) < 0 or abs(sum(own) - 1) > _SUM_TOLERANCE:
        raise UserError(
            f"the shares of layer {layer.index} must be {layer.num_experts} numbers, none below 0, that "
            f"sum to one, got {own}"
        )
    return own


def _units(view: DiskView, weights: Mapping[int, tuple[float, ...]]) -> list[Unit]:
    """What is outside experts and routers as it is, and each layer's average where its router stood."""
    inside: dict[str, DiskLayer] = {}
    for layer in view.layers:
        names = [name for e in range(layer.num_experts) for name in layer.expert_tensor_names(e)]
        names += [*layer.fused_tensor_names(), *view.sources[layer.site.router_weight].names]
        inside.update(dict.fromkeys(names, layer))
    units: list[Unit] = []
    written: set[int] = set()
    for name, entry in view.entries.items():
        layer_of = inside.get(name)
        if layer_of is None:
            units.append(CopyRows.of(entry))
        elif layer_of.index not in written:
            written.add(layer_of.index)
            units.append(_Average(layer_of, weights[layer_of.index], compute_dtype(view.config)))
    return units


@final
@dataclass(frozen=True, eq=False)
class _Average(Unit):
    """Writes a layer's feed-forward part, reading one expert at a time."""

    layer: DiskLayer
    shares: tuple[float, ...]
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """Gate, up and down."""
        shape, prefix = self.layer.shape, f"model.layers.{self.layer.index}."
        tall, wide = (shape.d_expert, shape.d_model), (shape.d_model, shape.d_expert)
        sizes = ((GATE, tall), (UP, tall), (DOWN, wide))
        return tuple(OutputTensor(prefix + name, self.dtype, size) for name, size in sizes)

    def write(self, sink: Sink) -> None:
        """Average and write."""
        total: list[Tensor] | None = None
        for expert, share in enumerate(self.shares):
            if not share:
                continue
            found = self.layer.expert(expert)
            parts = [part for part in (found.gate, found.up, found.down) if part is not None]
            for part in parts:
                require_finite(f"expert {expert} of layer {self.layer.index}", part)
            scaled = [share * part.double() for part in parts]
            total = scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]
        assert total is not None
        for output, value in zip(self.tensors, total, strict=True):
            sink.write(output.name, value.to(self.dtype))


def _terms(source: Path, out: Path, weights: Mapping[int, tuple[float, ...]], shard_bytes: int) -> Terms:
    return Terms(
        plan=sha256(repr(sorted(weights.items())).encode()).hexdigest(),
        source=checkpoint_digest(source),
        source_name=source.resolve().name,
        name=out.absolute().name,
        shard_bytes=shard_bytes,
        threads=torch.get_num_threads(),
        mixtura=mixtura.__version__,
    )


def _write_own_files(folder: Path, source: Path, config: Any) -> None:
    write_text(folder / "config.json", config.to_json_string())
    card = (
        f"# {config.model_type} of averaged experts\n\nMade by mixtura {mixtura.__version__} of "
        f"`{source.resolve().name}`: in each layer the experts' average is the feed-forward part.\n"
    )
    write_text(folder / "README.md", card)
    try:
        DenseView(folder)
    except UserError as error:
        raise MixturaError(f"what was written to {folder} does not open: {error}") from error
