"""Where the experts of a layer live when they are not plain parameters: packed in memory, or on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, final

import torch
from torch import Tensor, nn

from mixtura.checkpoints.nesting import Widths, check_named, layer_at, widths_of
from mixtura.checkpoints.packed import ExpertRecord, LayerRecord, read_expert
from mixtura.checkpoints.viewing.base import LayerView
from mixtura.kernels import ExpertMatrices, ExpertTensors, NativeLayer

# Vector loads of decoders start at multiples of this many bytes.
_ALIGNMENT = 64

Instead = Callable[[int, int, torch.dtype], ExpertTensors | None]


@final
@dataclass(frozen=True, slots=True)
class Form:
    """Name, dtype and shape of one stored tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def packed_num_bytes(sizes: Iterable[int]) -> int:
    """Bytes a `PackedStore` of tensors of these sizes takes in memory."""
    return sum(map(_aligned, sizes))


@final
class PackedStore:
    """All experts of one layer in the widths they are stored in, in one piece of memory.

    An expert is multiplied as it is stored where the compiled kernels can, else decoded each time it
    is used; nothing decoded is kept. Experts that hold several widths in one copy are read at the widest
    that is here, or as `at` says.

    Args:
        layer: the layer, with the records of its experts.
        forms: every tensor of every expert.
        transposed: whether the module multiplies by ``[in, out]`` matrices.
    """

    def __init__(self, layer: LayerRecord, forms: Iterable[Form], *, transposed: bool) -> None:
        assert layer.experts is not None
        self.num_experts = len(layer.experts)
        self._layer = self._read = layer
        self._transposed = transposed
        self._places: dict[str, tuple[int, Form]] = {}
        total = 0
        for form in forms:
            self._places[form.name] = (total, form)
            total += _aligned(form.num_bytes)
        self._memory = torch.empty(total, dtype=torch.uint8)
        # By expert, and by the tensors that are read of it.
        self._matrices: dict[tuple[int, tuple[str, ...]], ExpertMatrices | None] = {}
        self._native: NativeLayer | None = None
        self._has_native = True

    @property
    def num_bytes(self) -> int:
        """Bytes the experts take in memory."""
        return self._memory.nbytes

    @property
    def records(self) -> tuple[ExpertRecord, ...]:
        """How each expert is stored."""
        assert self._layer.experts is not None
        return self._layer.experts

    @property
    def layer(self) -> LayerRecord:
        """The layer as it is stored."""
        return self._layer

    @property
    def bits(self) -> tuple[int | None, ...]:
        """Bits each expert is read at; None for those that do not hold several widths."""
        assert self._read.experts is not None
        return tuple(max(widths_of(expert), default=None) for expert in self._read.experts)

    @property
    def read_bytes(self) -> tuple[int, ...]:
        """Bytes that running each expert reads."""
        assert self._read.experts is not None
        named = (self._read.tensor_names(number) for number in range(self.num_experts))
        return tuple(sum(self._places[name][1].num_bytes for name in names) for names in named)

    def at(self, widths: Widths | None) -> PackedStore:
        """The same experts in the same memory, those that hold several widths read at other bits.

        Args:
            widths: bits for all of them; or by decoder layer and expert, the others at the widest that is
                here; or None for the widest.

        Raises:
            UserError: an expert that is named does not hold that width here.
        """
        # Another store, and not a change of this one: what was made of it still holds.
        other = copy.copy(self)
        other._read, other._matrices = layer_at(self._layer, widths), self._matrices
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Without what the kernels made of this very memory, which a copy makes anew of its own."""
        return {**self.__dict__, "_matrices": {}, "_native": None, "_has_native": True}

    def get(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """Decode one expert."""
        return read_expert(self._read, expert, self.tensor).native(dtype, transposed=self._transposed)

    def native_layer(self) -> NativeLayer | None:
        """The experts for the compiled kernels, in place; None where some is stored as these cannot read."""
        if self._native is None and self._has_native:
            experts = [self._expert_matrices(expert) for expert in range(self.num_experts)]
            known = [expert for expert in experts if expert is not None]
            self._native = NativeLayer.of(known) if len(known) == len(experts) else None
            self._has_native = self._native is not None
        return self._native

    def _expert_matrices(self, expert: int) -> ExpertMatrices | None:
        assert self._read.experts is not None
        key = self._read.place(expert), self._read.experts[expert].up.parts
        if key not in self._matrices:
            self._matrices[key] = read_expert(self._read, expert, self.tensor).matrices()
        return self._matrices[key]

    @property
    def num_parameters(self) -> int:
        """Numbers that the experts stand for, however few bits each has."""
        stored = [self.records[number] for number in self._layer.stored]
        matrices = [matrix for expert in stored for matrix in (expert.up, expert.down)]
        # Biases have as many entries as their matrix has rows.
        biases = sum(expert.up.rows + expert.down.rows for expert in stored if expert.has_bias)
        return sum(matrix.rows * matrix.cols for matrix in matrices) + biases

    @property
    def state(self) -> dict[str, Tensor]:
        """All that the store holds, as one tensor of bytes, and a digest of how the experts lie in it."""
        forms = [(name, start, str(form.dtype), form.shape) for name, (start, form) in self._places.items()]
        digest = sha256(repr((forms, self._layer.experts, self._layer.shared)).encode()).digest()
        return {"packed": self._memory, "packed_as": torch.frombuffer(bytearray(digest), dtype=torch.uint8)}

    def tensor(self, name: str) -> Tensor:
        """One stored tensor by its name: a view, so that writing to it fills the store."""
        start, form = self._places[name]
        return self._memory[start : start + form.num_bytes].view(form.dtype).view(form.shape)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors to their places."""
        for name, tensor in tensors.items():
            self.tensor(name).copy_(tensor)


def keep_in_state(experts: nn.Module) -> None:
    """Let the ``state_dict`` of an experts module hold what its `PackedStore` does, and fill it from one."""
    experts.register_state_dict_post_hook(_add_to_state)
    experts.register_load_state_dict_pre_hook(_take_from_state)


def _add_to_state(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    state.update({f"{prefix}{name}": tensor for name, tensor in module.mixtura_store.state.items()})


def _take_from_state(
    module: Any,
    state: dict[str, Any],
    prefix: str,
    _metadata: Any,
    strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    own = module.mixtura_store.state
    given = {name: state.pop(f"{prefix}{name}", None) for name in own}
    absent = [f"{prefix}{name}" for name, tensor in given.items() if tensor is None]
    if absent:
        missing.extend(absent if strict else ())
    elif not torch.equal(given["packed_as"].cpu(), own["packed_as"]):
        errors.append(f"{prefix}packed holds experts stored as another plan says; load what that plan wrote")
    else:
        own["packed"].copy_(given["packed"])


def count_stores(model: nn.Module) -> None:
    """Let a model count experts that are in stores among its parameters and its memory."""
    counted: Any = model
    counted.num_parameters = partial(_num_parameters, model)
    counted.get_memory_footprint = partial(_memory_footprint, model)


def _packed_stores(model: nn.Module) -> list[PackedStore]:
    held = (getattr(module, "mixtura_store", None) for module in model.modules())
    return [store for store in held if isinstance(store, PackedStore)]


def _num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """`PreTrainedModel.num_parameters`; experts in fewer bits are never trained."""
    rest = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    return int(rest) + (0 if only_trainable else sum(store.num_parameters for store in _packed_stores(model)))


def _memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """`PreTrainedModel.get_memory_footprint`."""
    rest = type(model).get_memory_footprint(model, return_buffers)
    return int(rest) + sum(store.num_bytes for store in _packed_stores(model))


@final
class DiskStore:
    """All experts of one layer of a checkpoint, each read from disk when it is used and kept by nobody.

    Args:
        layer: a layer of a view of a checkpoint.
        instead: asked first, by the decoder layer's number, the expert's and the dtype, for what is to run in
            an expert's place; where it answers, the expert is not read.
    """

    def __init__(self, layer: LayerView, instead: Instead | None = None) -> None:
        self.num_experts = layer.num_experts
        self._layer = layer
        self._instead = instead

    def get(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """Read one expert."""
        known = None if self._instead is None else self._instead(self._layer.index, expert, dtype)
        return self._layer.native_expert(expert).to(dtype) if known is None else known


def set_bits(model: nn.Module, widths: Widths | None) -> None:
    """Read a loaded model's experts that hold several widths in one copy at other bits from now on.

    Nothing is written or moved: a narrower width passes over fewer bytes. What `mixtura.load` left on disk
    because of its own ``bits`` is not here to be read.

    Args:
        model: from `mixtura.load`, with experts written by the quantizer ``nested``.
        widths: bits for all such experts; or by decoder layer and expert, the others at the widest that is
            here; or None for the widest.

    Raises:
        UserError: the model has no such experts, or one that is named does not hold that width here.
    """
    modules = [m for m in model.modules() if isinstance(getattr(m, "mixtura_store", None), PackedStore)]
    stores: list[PackedStore] = [module.mixtura_store for module in modules]  # type: ignore[misc]
    check_named(tuple(store.layer for store in stores), widths)
    # All of it is changed, or nothing.
    for module, store in zip(modules, [store.at(widths) for store in stores], strict=True):
        module.mixtura_store = store  # type: ignore[assignment]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
