"""Where in a model adapters can be: its experts and its linear layers, by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import nn

from mixtura.adapting.blocks import is_block, projections
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


def site_of(module: nn.Module, name: str, num_layers: int, peers: tuple[str, ...] = ()) -> Site:
    """The site that a module of the plain model is, beside those that share something with it.

    Raises:
        UnsupportedModelError: it is neither linear nor experts.
    """
    kind, count = kind_of(module, name), 0
    if kind == "experts":
        count, shapes = matrix_shapes(module)
    elif kind == "block":
        parts = projections(module).items()
        shapes = {name: MatrixShape(part.out_features, part.in_features) for name, part in parts}
    else:
        linear: Any = module
        shapes = {"weight": MatrixShape(linear.out_features, linear.in_features)}
    return Site(
        name=name,
        kind=kind,
        layer=layer_of(name),
        num_layers=num_layers,
        matrices=shapes,
        num_experts=count,
        peers=peers,
    )


def kind_of(module: nn.Module, name: str) -> Literal["linear", "experts", "block"]:
    """What a module is to adapters.

    Raises:
        UnsupportedModelError: it is neither linear nor experts nor a dense feed-forward part.
    """
    if is_experts(module):
        return "experts"
    if is_block(module):
        return "block"
    if isinstance(getattr(module, "out_features", None), int) and isinstance(
        getattr(module, "in_features", None), int
    ):
        return "linear"
    raise UnsupportedModelError(
        f"{name} is a {type(module).__name__}; adapters change linear layers, dense feed-forward parts and "
        "experts, so target those"
    )


def layer_of(name: str) -> int:
    """The number of the decoder layer that a module's name has; 0 where it has none."""
    number = _NUMBER.search(name)
    return int(number.group(1)) if number else 0


def shared_by(scope: str | None, module: nn.Module, name: str) -> str:
    """What tells the sites that share something with one from others, by the scope of what is shared."""
    if scope is None:
        return name
    if scope == "layer":
        return str(layer_of(name))
    if scope == "role":
        site = site_of(module, name, 1)
        sizes = ",".join(f"{shape.rows}x{shape.cols}" for shape in site.matrices.values())
        return f"{name.rpartition('.')[2]} {sizes}"
    return ""


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


def default_targets(model: nn.Module, changed: Collection[str]) -> list[str]:
    """What an adapter changes where nothing is named, as the shortest ends of names that mean just that.

    Args:
        model: with or without what wraps it.
        changed: of ``experts``, ``blocks`` and ``linear``.

    Raises:
        UnsupportedModelError: the model has no experts, or no dense feed-forward parts, that are to be
        changed.
    """
    plain = plain_model(model)
    names = [plain_name(name) for name, _ in plain.named_modules()]
    found = _experts_in(plain) if "experts" in changed else []
    if "blocks" in changed:
        found += _blocks_in(plain)
    if "linear" in changed:
        left_out = {*router_names(plain), *_heads(plain), *found}
        found += [
            plain_name(name)
            for name, module in plain.named_modules()
            if isinstance(inner(module), nn.Linear | PackedLinear) and not _within(plain_name(name), left_out)
        ]
    return _ends(list(dict.fromkeys(found)), names)


def _experts_in(plain: nn.Module) -> list[str]:
    found = [name for name, _ in experts_modules(plain)]
    if not found:
        raise UnsupportedModelError(
            f"{_family(plain)} has no experts that mixtura knows; choose an adapter that changes linear "
            "layers, such as lora"
        )
    return found


def _blocks_in(plain: nn.Module) -> list[str]:
    found = [plain_name(name) for name, module in plain.named_modules() if is_block(inner(module))]
    if not found:
        raise UnsupportedModelError(
            f"{_family(plain)} has no dense feed-forward part of gate_proj, up_proj and down_proj; choose "
            "another adapter, such as expert_lora where the model has experts or moe_lora where not"
        )
    return list(dict.fromkeys(found))


def _family(plain: nn.Module) -> str:
    return str(getattr(getattr(plain, "config", None), "model_type", type(plain).__name__))


def base_digest(model: nn.Module) -> str:
    """What tells models apart that an adapter may be put on: their structure, then some of their values.

    Experts in fewer bits are those of the model that they were made of. Of embeddings in fewer bits no values
    are looked at, which rounding has changed.
    """
    plain: Any = plain_model(model)
    experts = [(name, *matrix_shapes(module)) for name, module in experts_modules(plain)]
    table = plain.get_input_embeddings() if hasattr(plain, "get_input_embeddings") else None
    embedding = None if isinstance(table, PackedEmbedding) else getattr(table, "weight", None)
    kind = _family(plain)
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
