"""Where in a model adapters can be: its experts and its linear layers, by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from mixtura.checkpoints.viewing.memory import MemoryView
from mixtura.checkpoints.viewing.wrappers import experts_modules, inner, plain_model, plain_name
from mixtura.errors import UnsupportedModelError
from mixtura.kernels import PackedEmbedding, PackedLinear
from mixtura.kernels.backend import matrix_shapes
from mixtura.types import MatrixShape, Site

_NUMBER = re.compile(r"\.(\d+)\.")
_SAMPLES = 256


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts under transformers' common contract."""
    return "_is_expert_parallel" in vars(module) and "is_concatenated" in vars(module)


def site_of(module: nn.Module, name: str, num_layers: int) -> Site:
    """The site that a module of the plain model is.

    Raises:
        UnsupportedModelError: it is neither linear nor experts.
    """
    number = _NUMBER.search(name)
    layer = int(number.group(1)) if number else 0
    if is_experts(module):
        count, shapes = matrix_shapes(module)
        return Site(
            name=name,
            kind="experts",
            layer=layer,
            num_layers=num_layers,
            matrices=shapes,
            num_experts=count,
        )
    rows, cols = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(rows, int) and isinstance(cols, int):
        shapes = {"weight": MatrixShape(rows, cols)}
        return Site(name=name, kind="linear", layer=layer, num_layers=num_layers, matrices=shapes)
    raise UnsupportedModelError(
        f"{name} is a {type(module).__name__}; adapters change linear layers and experts, so target those"
    )


def num_layers_of(model: Any) -> int:
    """L, the decoder layers of a model; 1 where its config does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "num_hidden_layers", 1) or 1)


def router_names(model: nn.Module) -> list[str]:
    """The routers of a model by name; none of a dense one."""
    if next(experts_modules(model), None) is None:
        return []
    return [layer.router_name for layer in MemoryView(model).layers]


def default_targets(model: nn.Module, *, experts: bool) -> list[str]:
    """What an adapter changes where nothing is named, as the shortest ends of names that mean just that.

    Raises:
        UnsupportedModelError: the model has no experts, and experts are what is to be changed.
    """
    plain = plain_model(model)
    names = [plain_name(name) for name, _ in plain.named_modules()]
    if experts:
        found = [name for name, _ in experts_modules(plain)]
        if not found:
            kind = getattr(getattr(plain, "config", None), "model_type", type(plain).__name__)
            raise UnsupportedModelError(
                f"{kind} has no experts that mixtura knows; choose an adapter that changes linear layers, "
                "such as lora"
            )
        return _ends(found, names)
    left_out = {*router_names(plain), *_heads(plain)}
    found = [
        plain_name(name)
        for name, module in plain.named_modules()
        if isinstance(inner(module), nn.Linear | PackedLinear) and not _within(plain_name(name), left_out)
    ]
    return _ends(list(dict.fromkeys(found)), names)


def base_digest(model: nn.Module) -> str:
    """What tells models apart that an adapter may be put on: their structure, then some of their values.

    Experts in fewer bits are those of the model that they were made of. Of embeddings in fewer bits no values
    are looked at, which rounding has changed.
    """
    plain: Any = plain_model(model)
    experts = [(name, *matrix_shapes(module)) for name, module in experts_modules(plain)]
    table = plain.get_input_embeddings() if hasattr(plain, "get_input_embeddings") else None
    embedding = None if isinstance(table, PackedEmbedding) else getattr(table, "weight", None)
    kind = str(getattr(getattr(plain, "config", None), "model_type", type(plain).__name__))
    size = None if embedding is None else tuple(embedding.shape)
    if isinstance(table, PackedEmbedding):
        size = (table.num_embeddings, table.embedding_dim)
    structure = (kind, num_layers_of(plain), size, experts)
    values = "" if isinstance(table, PackedEmbedding) else _short(_values(embedding))
    return f"{_short(repr(structure).encode())}-{values}"


def _values(held: torch.Tensor | None) -> bytes:
    """Some of a tensor's values, the same in every dtype that it may be loaded in."""
    if held is None or held.is_meta or not held.numel():
        return b""
    flat = held.detach().reshape(-1)
    step = max(flat.numel() // _SAMPLES, 1)
    return bytes(flat[::step].to(torch.bfloat16).contiguous().cpu().view(torch.uint8).tolist())


def _short(content: bytes) -> str:
    return sha256(content).hexdigest()[:12]


def _heads(model: Any) -> list[str]:
    """The layers that make predictions of the last states."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return [name for name, module in model.named_modules() if head is not None and module is head]


def _within(name: str, owners: Collection[str]) -> bool:
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)


def _ends(wanted: Sequence[str], every: Sequence[str]) -> list[str]:
    """The shortest ends of names, alike in length, that match all that is wanted and nothing else."""
    chosen = set(wanted)
    for length in range(1, max((name.count(".") for name in wanted), default=0) + 2):
        ends = {".".join(name.split(".")[-length:]) for name in wanted}
        matched = {n for n in every if any(n == end or n.endswith(f".{end}") for end in ends)}
        if matched == chosen:
            return sorted(ends)
    return sorted(chosen)
