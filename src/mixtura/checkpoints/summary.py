"""What a checkpoint holds, from its headers alone: family, layers, experts, sizes, what a token reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from mixtura.checkpoints.packed import MATRICES, MatrixRecord, bias_name, part_name
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.viewing.beside import adapter_of
from mixtura.checkpoints.viewing.disk import DiskLayer
from mixtura.checkpoints.viewing.packed import PackedLayer


@final
@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One MoE layer.

    Attributes:
        index: number of the decoder layer.
        num_experts: E, routed experts.
        top_k: K, experts a token chooses.
        num_groups: groups of experts of which a token may use `top_groups`; 1 where there is no limit.
        top_groups: groups a token may choose from.
        d_model: width of the model.
        d_expert: width of one expert.
        router: how experts are scored: "softmax", "sigmoid", "hash" or another word.
        has_correction_bias: whether a bias is added to the scores for the choice only.
        has_shared_experts: whether there are experts that every token passes.
        expert_parameters: parameters of one routed expert.
        expert_num_bytes: bytes of one routed expert as stored; the mean where they differ.
    """

    index: int
    num_experts: int
    top_k: int
    num_groups: int
    top_groups: int
    d_model: int
    d_expert: int
    router: str
    has_correction_bias: bool
    has_shared_experts: bool
    expert_parameters: int
    expert_num_bytes: int


@final
@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One checkpoint.

    Attributes:
        family: transformers' name of the family, its ``model_type``.
        num_layers: decoder layers, dense ones included.
        layers: the MoE layers.
        num_parameters: all parameters of the model.
        active_parameters: those that take part in one token: all but the experts it does not choose.
        expert_parameters: those of all routed experts together.
        num_bytes: bytes of all weights as stored.
        expert_num_bytes: bytes of all routed experts as stored.
        bytes_per_token: bytes one token reads: the chosen experts, everything dense, and one row of an
            embedding that is not the output layer too.
        stored_as: bytes by stored number format or quantizer, largest first.
        unused_num_bytes: bytes in the files that transformers' model does not use, such as
            multi-token prediction layers; in no other number.
        num_files: weight files.
        adapter: the kind of adapter beside the weights, such as ``LORA``, or None; in none of the numbers.
    """

    family: str
    num_layers: int
    layers: tuple[LayerSummary, ...]
    num_parameters: int
    active_parameters: int
    expert_parameters: int
    num_bytes: int
    expert_num_bytes: int
    bytes_per_token: int
    stored_as: Mapping[str, int]
    unused_num_bytes: int
    num_files: int
    adapter: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return asdict(self)


def summarize(view: CheckpointView) -> ModelSummary:
    """What a checkpoint of either kind holds, from what opening it has read; no weight is touched."""
    layers = tuple(_layer(layer) for layer in view.layers)
    routed = {p for layer in view.layers for p in layer.expert_parameters}
    dense = _stored(view, (name for name in view.sources if name not in routed))
    dense_bytes = sum(view.stored[name].num_bytes for name in dense)
    dense_parameters = sum(math.prod(view.stored[name].shape) for name in dense)
    experts = sum(layer.num_experts * layer.expert_parameters for layer in layers)
    expert_bytes = sum(layer.num_experts * layer.expert_num_bytes for layer in layers)
    chosen = sum(layer.top_k * layer.expert_parameters for layer in layers)
    chosen_bytes = sum(layer.top_k * layer.expert_num_bytes for layer in layers)
    return ModelSummary(
        family=view.model_type,
        num_layers=int(view.config.get_text_config().num_hidden_layers),
        layers=layers,
        num_parameters=dense_parameters + experts,
        active_parameters=dense_parameters + chosen,
        expert_parameters=experts,
        num_bytes=dense_bytes + expert_bytes,
        expert_num_bytes=expert_bytes,
        bytes_per_token=dense_bytes + chosen_bytes - _unread_embedding_bytes(view),
        stored_as=_stored_as(view),
        unused_num_bytes=sum(view.stored[name].num_bytes for name in view.unused_names),
        num_files=len(view.files),
        adapter=adapter_of(view.path),
    )


def _layer(layer: DiskLayer | PackedLayer) -> LayerSummary:
    shape, layout = layer.shape, layer.layout
    num_matrices = 3 if layout.has_gate else 2
    parameters = num_matrices * shape.d_model * shape.d_expert
    if layout.has_bias:
        parameters += (num_matrices - 1) * shape.d_expert + shape.d_model
    return LayerSummary(
        index=layer.index,
        num_experts=shape.num_experts,
        top_k=layer.top_k,
        num_groups=layer.num_groups,
        top_groups=layer.top_groups,
        d_model=shape.d_model,
        d_expert=shape.d_expert,
        router=layer.scoring,
        has_correction_bias=layer.site.correction_bias is not None,
        has_shared_experts=bool(layer.shared_experts),
        expert_parameters=parameters,
        expert_num_bytes=layer.expert_num_bytes,
    )


def _stored(view: CheckpointView, parameters: Iterable[str]) -> set[str]:
    return {name for parameter in parameters for name in view.sources[parameter].names}


def _stored_as(view: CheckpointView) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for name in _stored(view, view.sources):
        kinds[view.stored[name].kind] += view.stored[name].num_bytes
    for layer in view.layers:
        if not isinstance(layer, PackedLayer) or layer.record.experts is None:
            continue
        for number in layer.record.stored:
            expert = layer.record.experts[number]
            for matrix in MATRICES:
                record = expert.matrix(matrix)
                names = [part_name(layer.name, number, matrix, part) for part in record.parts]
                kinds[_quantizer_name(record)] += sum(view.entries[name].num_bytes for name in names)
                if expert.has_bias:
                    bias = view.entries[bias_name(layer.name, number, matrix)]
                    kinds[str(bias.dtype).removeprefix("torch.")] += bias.num_bytes
    return dict(kinds.most_common())


def _quantizer_name(record: MatrixRecord) -> str:
    if record.quantizer is None:
        return record.dtype
    settings = ", ".join(f"{key}={value}" for key, value in record.settings.items())
    return f"{record.quantizer}({settings})"


def _unread_embedding_bytes(view: CheckpointView) -> int:
    """Bytes of the input embedding but for one row; 0 where the output layer reads all of it."""
    model: Any = view.meta_model
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    name = next((n for n, p in model.named_parameters(remove_duplicate=False) if p is weight), None)
    if weight is None or name not in view.sources or model.config.get_text_config().tie_word_embeddings:
        return 0
    num_bytes = sum(view.stored[part].num_bytes for part in view.sources[name].names)
    return num_bytes - num_bytes // int(weight.shape[0])
