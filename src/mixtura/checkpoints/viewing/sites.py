"""Finding the MoE layers of a model: where the experts, the router and the biases are."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import Tensor, nn
from transformers.integrations import moe

from mixtura.checkpoints.viewing.meta import named_tensors
from mixtura.checkpoints.viewing.records import ExpertLayout, Site
from mixtura.checkpoints.viewing.wrappers import experts_modules, own_of, plain_name, submodule
from mixtura.errors import CheckpointError, UnsupportedModelError
from mixtura.kernels.records import ROUTER_NAMES
from mixtura.types import LayerShape

_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
_SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp", "shared_expert_gate")
_SIDE_STACK = re.compile(r"talker|vision|visual|audio|encoder")
_NUMBER = re.compile(r"\.(\d+)(?=\.)")


def layout_of(experts: Any) -> ExpertLayout:
    """How an experts module stores its experts."""
    return ExpertLayout(
        transposed=bool(experts.is_transposed),
        interleaved=not experts.is_concatenated,
        has_bias=bool(experts.has_bias),
        has_gate=bool(experts.has_gate),
        has_post_norm=bool(experts.has_post_expert_norm),
        custom_gate=type(experts)._apply_gate is not moe._default_apply_gate,
    )


def shape_of(down: Tensor, layout: ExpertLayout) -> LayerShape:
    """Sizes of a layer from its experts' down projection."""
    num_experts, first, second = down.shape
    d_model, d_expert = (second, first) if layout.transposed else (first, second)
    return LayerShape(d_model=d_model, d_expert=d_expert, num_experts=num_experts)


def stack_of(name: str) -> tuple[str, int]:
    """The name of an experts module with its layer number replaced by ``*``, and that number.

    >>> stack_of("model.layers.3.mlp.experts")
    ('model.layers.*.mlp.experts', 3)
    """
    numbers = list(_NUMBER.finditer(name))
    if not numbers:
        return name, 0
    last = numbers[-1]
    return f"{name[: last.start(1)]}*{name[last.end(1) :]}", int(last.group(1))


def ordered_stacks(names: list[str]) -> list[str]:
    """Stacks of MoE layers, the language model's first, talkers and vision towers after it."""
    stacks = list(dict.fromkeys(stack_of(name)[0] for name in names))
    return sorted(stacks, key=lambda stack: bool(_SIDE_STACK.search(stack)))


def stack_offsets(model: nn.Module, names: list[str]) -> dict[str, int]:
    """What to add to a layer's number in each stack so that every layer's index is its own."""
    offsets: dict[str, int] = {}
    total = 0
    for stack in ordered_stacks(names):
        offsets[stack] = total
        head = stack.partition(".*")[0]
        total += len(list(submodule(model, head).children())) if head != stack else 1
    return offsets


def find_sites(model: nn.Module, expert_axes: dict[str, int]) -> tuple[Site, ...]:
    """Every MoE layer of ``model`` in order. ``expert_axes``: see `viewing.probe.expert_axes`."""
    modules = dict(experts_modules(model))
    offsets = stack_offsets(model, list(modules))
    tensors = {plain_name(name): tensor for name, tensor in named_tensors(model).items()}
    sites = [_site(model, name, module, offsets, tensors, expert_axes) for name, module in modules.items()]
    return tuple(sorted(sites, key=lambda site: site.index))


def _site(
    model: nn.Module,
    name: str,
    experts: Any,
    offsets: dict[str, int],
    tensors: dict[str, Tensor],
    expert_axes: dict[str, int],
) -> Site:
    stack, number = stack_of(name)
    block_name = name.rpartition(".")[0]
    block = submodule(model, block_name)
    router_name = next(f"{block_name}.{n}" for n in ROUTER_NAMES if hasattr(block, n))
    router = own_of(submodule(model, router_name))
    layout = layout_of(experts)
    axes = {
        key: axis
        for key, axis in expert_axes.items()
        if key.startswith(f"{block_name}.") and not key.startswith(f"{name}.")
    }
    top_k = _top_k(router, block)
    num_groups, top_groups = _groups(router)
    shape = shape_of(experts.down_proj, layout)
    _require_possible(f"layer {offsets[stack] + number}", shape.num_experts, top_k, num_groups, top_groups)
    return Site(
        index=offsets[stack] + number,
        stack=stack,
        name=name,
        block_name=block_name,
        router_name=router_name,
        layout=layout,
        shape=shape,
        top_k=top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        router_weight=_router_weight(router_name, router),
        correction_bias=next((key for key in axes if key.rpartition(".")[2] in _BIAS_NAMES), None),
        shared_experts=_shared(block_name, tensors),
        expert_axes=axes,
        hash_routed=hasattr(router, "tid2eid"),
        scoring=_scoring(router),
    )


def _require_possible(layer: str, num_experts: int, top_k: int, num_groups: int, top_groups: int) -> None:
    """Refuse a choice that a layer's experts do not allow; transformers finds out at the first token."""
    if not 1 <= top_k <= num_experts:
        raise CheckpointError(
            f"a token would choose {top_k} of the {num_experts} experts of {layer}; config.json must name "
            f"from 1 to {num_experts} (num_experts_per_tok in most families)"
        )
    if num_experts % num_groups or not 1 <= top_groups <= num_groups:
        raise CheckpointError(
            f"{top_groups} of {num_groups} groups would be chosen of the {num_experts} experts of {layer}; "
            "config.json must name groups of equal size (n_group) and at most as many chosen (topk_group)"
        )
    most = top_groups * (num_experts // num_groups)
    if top_k > most:
        raise CheckpointError(
            f"a token would choose {top_k} experts of {layer}, but {top_groups} of its {num_groups} groups "
            f"hold {most}; config.json must name fewer experts or more groups"
        )


def _router_weight(name: str, router: nn.Module) -> str:
    """The router's matrix: its own ``weight``, else the last matrix of its sub-modules."""
    matrices = [key for key, value in router.named_parameters() if value.ndim == 2]
    if not matrices:
        raise UnsupportedModelError(
            f"the router {name} holds no matrix: its layers were replaced, perhaps by ones in fewer bits; "
            "leave routers as they are"
        )
    return f"{name}.{'weight' if 'weight' in matrices else matrices[-1]}"


def _top_k(router: Any, block: Any) -> int:
    for owner, attribute in ((router, "top_k"), (block, "top_k")):
        value = getattr(owner, attribute, None)
        if isinstance(value, int):
            return value
    for attribute in ("top_k_experts", "num_experts_per_tok"):
        value = getattr(router.config, attribute, None)
        if isinstance(value, int):
            return value
    raise LookupError(f"no top_k on {type(router).__name__}")


def _groups(router: Any) -> tuple[int, int]:
    """How many groups the experts form and how many of them a token may choose from (1, 1: no limit)."""
    num_groups = getattr(router, "num_group", None) or 1
    if getattr(router, "topk_method", "") == "greedy":
        return 1, 1
    return num_groups, (getattr(router, "topk_group", None) or 1) if num_groups > 1 else 1


def _shared(block_name: str, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Tensors of experts that every token passes, in the block or beside it."""
    outer = block_name.rpartition(".")[0]
    prefixes = tuple(f"{owner}.{name}." for owner in (block_name, outer) for name in _SHARED_NAMES)
    return tuple(key for key in tensors if key.startswith(prefixes))


def _scoring(router: Any) -> str:
    """How the router turns logits into weights, for people: ``softmax``, ``sigmoid`` or another word."""
    if hasattr(router, "tid2eid"):
        return "hash"
    named = getattr(router, "expert_selection_fn", None)
    if isinstance(named, str):
        return named
    for attribute in ("score_fn", "scoring_function"):
        function = getattr(router, attribute, None)
        if function is not None:
            name = str(getattr(function, "__name__", type(function).__name__))
            return name.lower().removesuffix("activation")
    source = inspect.getsource(type(router).forward)
    return next((word for word in ("sparsemixer", "sigmoid", "softmax") if word in source), "other")
