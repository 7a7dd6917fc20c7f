"""The tensors of a GGUF file before any is read: names, shapes, types, and where their values come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.checkpoints.gguf.families import Family
from mixtura.checkpoints.gguf.libraries import check_writable
from mixtura.checkpoints.gguf.package import gguf_package
from mixtura.checkpoints.gguf.types import (
    NEED_IMPORTANCE,
    PLAIN,
    StorageType,
    TypeRules,
    fitting_type,
    storage_type,
)
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.viewing.base import LayerView
from mixtura.checkpoints.viewing.reader import compute_dtype
from mixtura.errors import UnsupportedModelError, UserError

# By the name of a linear layer, or of an expert's matrix: the mean square of each input.
Importance = Mapping[str, Float[Tensor, " C"]]
Part = Literal["gate", "up", "down"]
_EXPERT_PARTS: dict[Part, str] = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
# Computed with in f32 whatever the file has, so that fewer bits would save nothing and lose something.
_ROUTER = re.compile(r"\.ffn_gate_inp(_shexp)?\.")


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, or one expert's matrix of one.

    Attributes:
        read: its values as the file has them.
        parameter: the parameter of the model that it is of; the experts' module for an expert's matrix.
        inputs: under which name its importance is.
        place: puts values as the file has them into the parameter as the model has it; None for an
            expert's matrix, of which ``expert`` says which it is.
        expert: the expert's number and which of its matrices.
    """

    read: Callable[[], Tensor]
    parameter: str
    inputs: str | None = None
    place: Callable[[Tensor, Tensor], None] | None = None
    expert: tuple[int, Part] | None = None


@final
@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of the file to be.

    ``wanted`` is the type that was asked for, where the tensor has another because its rows are no whole
    blocks of it.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    kind: StorageType
    wanted: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes it takes, without what aligns the next one."""
        return self.kind.num_bytes(self.shape)

    @property
    def is_rounded(self) -> bool:
        """Whether it is stored in a type of blocks."""
        return not self.kind.is_plain

    @property
    def may_be_rounded(self) -> bool:
        """Whether it may be stored in fewer bits: matrices but routers."""
        return _has_rule(self.name, self.shape)

    def stored_as(self, name: str) -> FileTensor:
        """The same tensor in a type, or in what that gives way to where rows are no whole blocks of it."""
        kind = fitting_type(name, self.shape[-1])
        return replace(self, kind=kind, wanted=None if kind.name == name else name)


def expert_inputs(layer: LayerView, expert: int, part: Part) -> str:
    """The name under which the importance of an expert's matrix is kept; gate and up have the same inputs."""
    return f"{layer.name}.{expert}.{'down' if part == 'down' else 'up'}"


def file_tensors(
    view: CheckpointView, family: Family, rules: TypeRules, *, calibrated: bool
) -> tuple[FileTensor, ...]:
    """All tensors of a model's file, in the model's order.

    Args:
        view: the checkpoint.
        family: what llama.cpp has to be told of its family.
        rules: which tensor is stored as what.
        calibrated: whether there will be importance.

    Raises:
        UnsupportedModelError: a tensor of the model has no place in llama.cpp.
        UserError: a rule is for no tensor, or a type cannot be written.
    """
    dtype = compute_dtype(view.config)
    found = [_typed(one, rules, dtype, calibrated=calibrated) for one in _untyped(view, family)]
    ruled = {one.name: _has_rule(one.name, one.shape) for one in found}
    rules.check_used(
        (name.removesuffix(".weight") for name, is_ruled in ruled.items() if is_ruled),
        (name.removesuffix(".weight") for name, is_ruled in ruled.items() if not is_ruled),
    )
    for kind in {one.kind for one in found}:
        check_writable(kind)
    return tuple(found)


@final
@dataclass(frozen=True, slots=True)
class _Untyped:
    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def _has_rule(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor may be stored in fewer bits: matrices but routers."""
    return len(shape) > 1 and _ROUTER.search(name) is None


def _typed(one: _Untyped, rules: TypeRules, dtype: torch.dtype, *, calibrated: bool) -> FileTensor:
    if not _has_rule(one.name, one.shape):
        return FileTensor(one.name, one.shape, one.pieces, storage_type("f32"))
    name = rules.wanted(one.name.removesuffix(".weight")) or PLAIN.get(dtype, "f32")
    kind = fitting_type(name, one.shape[-1])
    if kind.name in NEED_IMPORTANCE and not (calibrated and all(piece.inputs for piece in one.pieces)):
        raise UserError(
            f"the type {kind.name} needs what calibration text says of a matrix's inputs, and there is "
            f"nothing of the kind for {one.name}; "
            + (
                f"give it another type, such as --type {one.name.removesuffix('.weight')}=q8_0"
                if calibrated
                else "leave calibration on"
            )
        )
    return FileTensor(one.name, one.shape, one.pieces, kind, None if kind.name == name else name)


def _untyped(view: CheckpointView, family: Family) -> Iterator[_Untyped]:
    names = _Names(view, family)
    layers = {layer.name: layer for layer in view.layers}
    for name, tensor in _stored_tensors(view, family):
        owner, _, parameter = name.rpartition(".")
        layer = layers.get(owner)
        if layer is None:
            yield from _dense(view, family, names, name, tuple(tensor.shape))
        elif parameter == layer.layout.parameters[-1]:
            yield from _experts(names, layer)


def _stored_tensors(view: CheckpointView, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Parameters and stored buffers of the model, a tied head only where it is needed."""
    state: dict[str, Tensor] = view.meta_model.state_dict()
    experts = {name for layer in view.layers for name in layer.expert_parameters}
    for name, tensor in state.items():
        if name not in view.sources and name not in experts:
            continue
        if name == "lm_head.weight" and not family.needs_head and _is_tied(view):
            continue
        yield name, tensor


def _is_tied(view: CheckpointView) -> bool:
    head, embedding = view.sources["lm_head.weight"], view.sources.get("model.embed_tokens.weight")
    return embedding is not None and head.names == embedding.names


def _dense(
    view: CheckpointView, family: Family, names: _Names, name: str, shape: tuple[int, ...]
) -> Iterator[_Untyped]:
    """A tensor outside of experts as it is in the file: one tensor, or the two of a latent's expansion."""
    inputs: str | None = name.removesuffix(".weight")
    if inputs == "model.embed_tokens":
        # Rows are looked up, and multiplied with only where the head is the same matrix.
        inputs = "lm_head" if _is_tied(view) else None

    def read() -> Tensor:
        return view.parameter(name)

    if family.latent and name.endswith(".kv_b_proj.weight"):
        yield from _expansion(view.config, names.layer(name), read, name, inputs)
        return
    heads = _rotated_heads(view.config, name) if family.pairs else 0

    def made() -> Tensor:
        value = read().reshape(_squeezed(shape))
        return _in_pairs(value, heads) if heads else value

    def place(whole: Tensor, value: Tensor) -> None:
        whole.copy_((_in_halves(value, heads) if heads else value).reshape(whole.shape))

    yield _Untyped(names.of(name), _squeezed(shape), (Piece(made, name, inputs, place),))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A matrix of one row is a vector there: a shared expert's gate."""
    return shape[1:] if len(shape) == 2 and shape[0] == 1 else shape


def _rotated_heads(config: Any, name: str) -> int:
    """Heads of a query or key projection, whose rows rotary positions turn; 0 for other tensors."""
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    if ".k_proj." in name:
        return int(config.num_key_value_heads)
    return 0


def _in_pairs(value: Tensor, heads: int) -> Tensor:
    """Rows of each head reordered: those of its two halves in turn."""
    halves = value.unflatten(0, (heads, 2, -1))
    turned: Tensor = halves.transpose(1, 2).flatten(0, 2)
    return turned


def _in_halves(value: Tensor, heads: int) -> Tensor:
    """Rows of each head as they were before `_in_pairs`."""
    pairs = value.unflatten(0, (heads, -1, 2))
    turned: Tensor = pairs.transpose(1, 2).flatten(0, 2)
    return turned


def _expansion(
    config: Any, layer: int, read: Callable[[], Tensor], name: str, inputs: str | None
) -> Iterator[_Untyped]:
    """What makes keys and values of a latent, apart; of the keys' part rows and columns change places."""
    heads, rank = int(config.num_attention_heads), int(config.kv_lora_rank)
    keys, values = int(config.qk_nope_head_dim), int(config.v_head_dim)

    def apart(whole: Tensor) -> Tensor:
        return whole.view(heads, keys + values, rank)

    def place_keys(whole: Tensor, value: Tensor) -> None:
        apart(whole)[:, :keys].copy_(value.transpose(1, 2))

    def place_values(whole: Tensor, value: Tensor) -> None:
        apart(whole)[:, keys:].copy_(value)

    key = Piece(lambda: apart(read())[:, :keys].transpose(1, 2), name, place=place_keys)
    yield _Untyped(f"blk.{layer}.attn_k_b.weight", (heads, rank, keys), (key,))
    value = Piece(lambda: apart(read())[:, keys:], name, inputs, place_values)
    yield _Untyped(f"blk.{layer}.attn_v_b.weight", (heads, values, rank), (value,))


def _experts(names: _Names, layer: LayerView) -> Iterator[_Untyped]:
    """The three tensors of a layer's experts, one matrix an expert."""
    sizes = layer.shape
    for part, there in _EXPERT_PARTS.items():
        matrix = (sizes.d_model, sizes.d_expert) if part == "down" else (sizes.d_expert, sizes.d_model)
        pieces = tuple(_expert_piece(layer, expert, part) for expert in range(layer.num_experts))
        name = f"blk.{names.layer(layer.name)}.{there}.weight"
        yield _Untyped(name, (layer.num_experts, *matrix), pieces)


def _expert_piece(layer: LayerView, expert: int, part: Part) -> Piece:
    def read() -> Tensor:
        found = getattr(layer.expert(expert), part)
        assert isinstance(found, Tensor)
        return found

    inputs = expert_inputs(layer, expert, part)
    return Piece(read, layer.name, inputs, expert=(expert, part))


@final
class _Names:
    """llama.cpp's names of a model's tensors."""

    def __init__(self, view: CheckpointView, family: Family) -> None:
        package = gguf_package()
        arch = next(key for key, name in package.MODEL_ARCH_NAMES.items() if name == family.arch)
        self._family = family
        self._map = package.get_tensor_name_map(arch, int(view.config.num_hidden_layers))

    def of(self, name: str) -> str:
        """The name there.

        Raises:
            UnsupportedModelError: there is none.
        """
        plain = name.replace(".e_score_correction_bias", ".e_score_correction.bias")
        found = self._map.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedModelError(
                f"llama.cpp's {self._family.arch} has no place for {name}, so that this model cannot be "
                f"written as GGUF"
            )
        return str(found)

    @staticmethod
    def layer(name: str) -> int:
        """The number of the decoder layer that a tensor is in."""
        match = re.search(r"\.layers\.(\d+)\.", name)
        assert match is not None
        return int(match[1])
