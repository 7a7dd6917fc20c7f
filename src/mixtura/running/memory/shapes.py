"""What generating allocates beside the weights, found by running the model on tensors without storage.

Every operation runs for its shapes alone, in the order and with the lifetimes of the real thing, so
that any family's attention and cache are accounted for without a formula of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mixtura.checkpoints.viewing.base import LayerView
from mixtura.kernels import Dispatch, ExpertTensors, Run, run_experts
from mixtura.kernels.backend import math_of
from mixtura.machine.releases import returned_cache, with_cache
from mixtura.running.generation import chunk_tokens, prefills_in_chunks, reserved_cache

# Memory that decoding a matrix takes beside the result, in bytes for each of its values, by how the
# experts are stored; plain numbers are not decoded.
DECODE_BYTES = {"fp8": 14, "mxfp4": 20, "packed": 4}


@final
@dataclass(frozen=True, slots=True)
class GeneratingShapes:
    """Bytes of the cache at a context length, and of everything else that lives beside the weights."""

    kv_cache_bytes: int
    working_bytes: int


def generating_shapes(
    model: PreTrainedModel, layers: Sequence[LayerView], context: int, kinds: Mapping[str, str]
) -> GeneratingShapes:
    """Trace one prompt of ``context - 1`` tokens and one new token.

    Args:
        model: a skeleton; it can no longer be used for anything else.
        layers: its MoE layers.
        context: tokens in the cache at the end.
        kinds: how the experts of each layer are stored, by the layer's name.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        _fill_with_shapes(model)
        for layer in layers:
            experts: Any = model.get_submodule(layer.name)
            shaped = _ShapedExperts(layer, experts, DECODE_BYTES.get(kinds[layer.name], 0))
            experts.forward = shaped.forward
        cache = reserved_cache(model, max(context, 2))
        allocations = _Allocations(model)
        prompt = max(context - 1, 1)
        chunk = chunk_tokens(model) if cache is not None and prefills_in_chunks(cache) else prompt
        last = prompt % chunk or min(chunk, prompt)
        # The last whole chunk sees the longest cache.
        whole = prompt - last
        with allocations:
            if whole >= chunk:
                if whole > chunk:
                    cache = _forward(model, whole - chunk, 0, cache)
                    allocations.forget_peak()
                cache = _forward(model, chunk, whole - chunk, cache)
            cache = _forward(model, last, whole, cache)
            cache = _forward(model, 1, prompt, cache)
            held = _cache_bytes(cache)
    return GeneratingShapes(held, allocations.peak - held)


def _forward(model: PreTrainedModel, num_tokens: int, past: int, cache: Cache | None) -> Cache | None:
    ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    mask = torch.ones(1, past + num_tokens, dtype=torch.int64)
    outputs = model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=True, **with_cache(cache))
    # generate copies the last logits to float32 and lets its processors change them.
    scores = outputs.logits[:, -1].to(torch.float32, copy=True)
    scores = torch.where(scores > 0, scores, scores)
    torch.argmax(scores, -1)
    made = returned_cache(outputs)
    return made if isinstance(made, Cache) else cache


def _cache_bytes(cache: Cache | None) -> int:
    """Bytes of all tensors a cache holds, each piece of memory once."""
    found: dict[int, int] = {}
    for layer in cache.layers if cache is not None else ():
        for value in tree_leaves(list(vars(layer).values())):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def _fill_with_shapes(model: nn.Module) -> None:
    """Put tensors without storage, but on the CPU, in the place of every parameter and buffer."""
    made: dict[int, Tensor] = {}

    def shaped(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            # Whether a weight requires a gradient decides how PyTorch multiplies by it and what it copies.
            made[id(tensor)] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
        return made[id(tensor)]

    for module in model.modules():
        stored: list[dict[str, Any]] = [module._parameters, module._buffers]
        for held in stored:
            filled = {name: shaped(tensor) for name, tensor in held.items() if tensor is not None}
            held.update(filled)


@final
class _ShapedExperts:
    """Runs the kernels on as many rows as can come together: every token choosing the same experts.

    ``decode_bytes`` is what decoding takes for each value beside the result, 0 for plain weights, of
    which only one expert's shapes are made, once.
    """

    def __init__(self, layer: LayerView, experts: Any, decode_bytes: int) -> None:
        self.num_experts = layer.num_experts
        self._layer = layer
        self._math = math_of(experts)
        self._decode_bytes = decode_bytes
        self._plain: ExpertTensors | None = None
        if not decode_bytes:
            self._plain = self._made(experts.down_proj.dtype)
            for name, tensor in self._plain._asdict().items():
                # Among the model's own tensors, which are not counted.
                experts.register_buffer(f"shaped_{name}", tensor)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What an experts module's forward allocates."""
        num_tokens, num_chosen = top_k_index.shape
        num_rows = num_tokens * num_chosen
        rows = torch.empty(num_rows, dtype=torch.int64)
        runs = tuple(Run(e, e * num_tokens, (e + 1) * num_tokens) for e in range(num_chosen))
        starts = torch.empty(num_tokens, dtype=torch.int64)
        dispatch = Dispatch(num_tokens, torch.empty_like(rows), rows, runs, torch.empty_like(rows), starts)
        weights = top_k_weights.reshape(-1)
        outputs = run_experts(hidden_states, weights, dispatch, self, self._math)
        return outputs.to(hidden_states.dtype)

    def get(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """One expert as it is decoded."""
        del expert
        return self._plain or self._made(dtype)

    def _made(self, dtype: torch.dtype) -> ExpertTensors:
        shape, layout = self._layer.shape, self._layer.layout
        features = shape.d_expert * (2 if layout.has_gate else 1)
        up = self._decoded(features, shape.d_model, dtype)
        down = self._decoded(shape.d_model, shape.d_expert, dtype)
        if layout.transposed:
            up, down = up.T, down.T
        if not layout.has_bias:
            return ExpertTensors(up, down)
        return ExpertTensors(
            up, down, torch.empty(features, dtype=dtype), torch.empty(shape.d_model, dtype=dtype)
        )

    def _decoded(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """A matrix, after memory for decoding it that is let go at once."""
        torch.empty(rows * cols * (self._decode_bytes + dtype.itemsize), dtype=torch.uint8)
        return torch.empty(rows, cols, dtype=dtype)


@final
class _Allocations(TorchDispatchMode):
    """Counts the bytes of tensors alive at once, those of a model's own left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = [*model.parameters(), *model.buffers()]
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in tensors}
        self._live = 0
        self.peak = 0

    def forget_peak(self) -> None:
        """Start again from what is alive now."""
        self.peak = self._live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and note what it allocated.

        How many values a mask chooses depends on what is in it; there cannot be more than all.
        """
        if func is torch.ops.aten.nonzero.default:
            result = _places(args[0])
        elif func is torch.ops.aten.index.Tensor:
            result = func(args[0], _without_masks(args[1]))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._live += storage.nbytes()
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _places(mask: Tensor) -> Tensor:
    """What `torch.nonzero` gives where everything is true."""
    return mask.new_empty(mask.numel(), mask.dim(), dtype=torch.int64)


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with the places of true values in the place of masks."""
    made: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        made.extend(_places(index).unbind(1) if index is not None and is_mask else [index])
    return made
