"""What a generating process needs, from a checkpoint's headers and config alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from transformers import PreTrainedModel

from mixtura.checkpoints.packed import STORED_KINDS as SCALED_KINDS
from mixtura.checkpoints.skeleton import CheckpointView, build, empty_experts, open_checkpoint
from mixtura.checkpoints.slots import slots
from mixtura.checkpoints.stores import packed_num_bytes
from mixtura.checkpoints.viewing.disk import DiskLayer
from mixtura.checkpoints.viewing.packed import PackedLayer
from mixtura.errors import SettingError
from mixtura.kernels.matmul import LARGE_WEIGHT
from mixtura.running.memory.process import KERNEL_CACHE_BYTES
from mixtura.running.memory.shapes import generating_shapes

TOKENIZER_FILE = "tokenizer.json"
# Measured on BPE tokenizers of 8 to 150 thousand tokens whose files are read before anything else is.
_TOKENIZER_BYTES, _TOKENIZER_FACTOR = 3 << 19, 3
# What the allocator cannot give back: pieces of pages between what is in use.
_SLACK_BYTES = 6 << 20
_SLACK_SHARE = 0.004
# Pages of the library that compiles kernels, and its own tables: they come into memory with the first
# product of 16 bits, which the bare runtime does not make. Measured 7 to 8.2 MiB with PyTorch 2.13; two
# measurements of the bare runtime differ by as much as what is added to that.
_KERNEL_LIBRARY_BYTES = 12 << 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAccount:
    """Bytes a generating process takes beyond the bare runtime.

    Attributes:
        weights_bytes: parameters and buffers as `mixtura.load` keeps them, experts in their bits.
        kv_cache_bytes: keys, values and states at the context length.
        working_bytes: activations, logits, decoded experts and what the allocator cannot give back.
        tokenizer_bytes: the tokenizer's tables.
        expert_bytes: the part of ``weights_bytes`` that is routed experts.
    """

    weights_bytes: int
    kv_cache_bytes: int
    working_bytes: int
    tokenizer_bytes: int
    expert_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_cache_bytes + self.working_bytes + self.tokenizer_bytes


def account(
    model: CheckpointView | str | Path,
    context: int,
    *,
    batch: int = 1,
    as_packed: bool = False,
    skeleton: PreTrainedModel | None = None,
) -> MemoryAccount:
    """Account for generating from a checkpoint with `running.generation`, without reading its weights.

    It is what generating takes with PyTorch's kernels. Compiled ones, which run on some machines for some
    numbers of tokens, decode nothing and compile nothing, and take up to 20 MiB less.

    Args:
        model: a checkpoint directory or a view of one.
        context: tokens of prompt and answer together.
        batch: sequences that are generated together.
        as_packed: count the working memory of experts that are decoded when they are used, although
            the checkpoint does not store them so yet.
        skeleton: the model as it is to be, without weights, where that is another than the checkpoint's; it
            can no longer be used for anything else.

    Raises:
        SettingError: ``context`` or ``batch`` is less than 1.
        CheckpointError: the directory is missing, incomplete or damaged.
    """
    if context < 1 or batch < 1:
        raise SettingError(f"context and batch must be at least 1, got {context} and {batch}")
    view = open_checkpoint(model) if isinstance(model, str | Path) else model
    skeleton = build(view) if skeleton is None else skeleton
    experts, kinds = 0, {}
    for layer in view.layers:
        kind = _kind(view, layer)
        # Decoding FP8 or MXFP4 takes more than decoding packed experts.
        kinds[layer.name] = "packed" if as_packed and kind not in SCALED_KINDS else kind
        held = empty_experts(skeleton, layer)
        experts += _expert_bytes(view, layer, kind, held.down_proj.dtype.itemsize)
    rest = sum(slot.empty.nbytes for slot in slots(skeleton))
    found = generating_shapes(skeleton, view.layers, context, kinds)
    activations = batch * (found.kv_cache_bytes + found.working_bytes)
    slack = _SLACK_BYTES + int(_SLACK_SHARE * (experts + rest + activations))
    if _compiles_kernels(skeleton.dtype, view):
        slack += KERNEL_CACHE_BYTES + _KERNEL_LIBRARY_BYTES
    return MemoryAccount(
        weights_bytes=experts + rest,
        kv_cache_bytes=batch * found.kv_cache_bytes,
        working_bytes=batch * found.working_bytes + slack,
        tokenizer_bytes=tokenizer_bytes(view.path),
        expert_bytes=experts,
    )


def tokenizer_bytes(path: Path) -> int:
    """What the tokenizer of a model directory takes in memory, about; 0 where there is none."""
    file = path / TOKENIZER_FILE
    return _TOKENIZER_BYTES + _TOKENIZER_FACTOR * file.stat().st_size if file.is_file() else 0


def _compiles_kernels(dtype: torch.dtype, view: CheckpointView) -> bool:
    """Whether PyTorch compiles a kernel for every shape it multiplies; see `running.memory.process`."""
    largest = max(layer.shape.d_model * layer.shape.d_expert for layer in view.layers)
    return dtype.itemsize == 2 or largest >= LARGE_WEIGHT // 2


def _kind(view: CheckpointView, layer: DiskLayer | PackedLayer) -> str:
    """How the experts of a layer are stored: ``packed``, ``fp8``, ``mxfp4`` or the name of a dtype."""
    if isinstance(layer, PackedLayer):
        return "packed"
    kinds = {view.stored[name].kind for p in layer.expert_parameters for name in view.sources[p].names}
    scaled = kinds & set(SCALED_KINDS)
    return scaled.pop() if scaled else kinds.pop()


def _expert_bytes(view: CheckpointView, layer: DiskLayer | PackedLayer, kind: str, itemsize: int) -> int:
    """What the experts of a layer take once they are loaded."""
    if isinstance(layer, PackedLayer):
        return packed_num_bytes(
            view.entries[name].num_bytes
            for e in range(layer.num_experts)
            for name in layer.expert_tensor_names(e)
        )
    if kind in SCALED_KINDS:
        return layer.num_experts * layer.expert_num_bytes
    shape, layout = layer.shape, layer.layout
    features = shape.d_expert * (2 if layout.has_gate else 1)
    biases = features + shape.d_model if layout.has_bias else 0
    return layer.num_experts * (features * shape.d_model + shape.d_model * shape.d_expert + biases) * itemsize
