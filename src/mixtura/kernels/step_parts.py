"""The parts of a decoder layer that one compiled call can run, found by their names, shapes and numbers.

Nothing here knows a family. A part is taken where its ``forward`` names nothing but what is known, and
every parameter has its place; whether it then computes the same is for `step_trial` to try. What is not
taken is `Declined` with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.kernels.activations import recognise
from mixtura.kernels.backend import experts_layer, math_of
from mixtura.kernels.compiled import NUMBERS, is_plain, native, rows_of
from mixtura.kernels.declined import Declined
from mixtura.kernels.linears import FewRowsLinear, PackedLinear
from mixtura.kernels.loads import loads_of
from mixtura.kernels.matrices import dense_matrix
from mixtura.kernels.step_router import find_router

LAYER_NAMES: Final = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_NAMES: Final = {
    "ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "apply_rotary_pos_emb", "attention_dropout", "clamp_",
    "clip_qkv", "config", "contiguous", "eager_attention_forward", "get_interface", "getattr", "head_dim",
    "is_causal", "is_sliding", "k_norm", "k_proj", "layer_idx", "o_proj", "q_norm", "q_proj", "reshape",
    "scaling",
    "shape", "sliding_window", "training", "transpose", "update", "use_qk_norm", "v_proj", "view",
}  # fmt: skip
_BLOCK_NAMES: Final = {
    "F", "dtype", "e_score_correction_bias", "empty_like", "experts", "float", "gate", "hidden_dim",
    "input_jitter_noise", "jitter_noise", "reshape", "router", "shape", "shared_expert", "shared_expert_gate",
    "shared_experts", "shared_mlp", "sigmoid", "size", "to", "torch", "training", "uniform_", "view",
}  # fmt: skip
_MLP_NAMES: Final = {"act_fn", "down_proj", "gate_proj", "up_proj"}
_SHARED: Final = ("shared_expert", "shared_experts", "shared_mlp")
# How tables of cosines and sines may turn heads, as the extension numbers them; 3: not at all.
ROTATIONS: Final = (0, 1, 2, 4, 3)
_NORM_TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@final
@dataclass(slots=True)
class Part:
    """The extension's record of a part, and what it was made of.

    Attributes:
        record: of the extension.
        holds: what must stay as long as the record.
        parameters: the tensors that the record reads.
    """

    record: Any
    holds: list[object] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)

    def take(self, *parts: Part) -> None:
        """Hold what other parts hold."""
        for part in parts:
            self.holds.extend((part.record, *part.holds))
            self.parameters.extend(part.parameters)


def names_of(module: nn.Module) -> set[str]:
    """Every name that the ``forward`` of a module's class uses."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return {"?"} if code is None else set(code.co_names)


def others_in(module: nn.Module, known: Collection[str]) -> str:
    """Names in a module's ``forward`` that are not known, for a reason; nothing where all are."""
    return ", ".join(sorted(names_of(module) - set(known)))


def linear_part(owner: Any, name: str, dtype: torch.dtype) -> Part:
    """A linear layer of any width.

    Raises:
        Declined: there is none, or the kernels cannot read it.
    """
    module: Any = getattr(owner, name, None)
    if type(module) in (nn.Linear, FewRowsLinear):
        if module.weight.dtype != dtype:
            raise Declined(f"its {name} is in {module.weight.dtype} beside norms in {dtype}")
        matrix = dense_matrix(module.weight)
    elif type(module) is PackedLinear:
        matrix = module.matrix()
    else:
        raise Declined(f"it has no {name}" if module is None else f"its {name} is a {type(module).__name__}")
    bias = module.bias
    if matrix is None or (bias is not None and not (is_plain(bias) and bias.is_contiguous())):
        raise Declined(f"the compiled kernels cannot read its {name} where it lies")
    extension = native()
    assert extension is not None
    tensors = [*matrix.holds] + ([] if bias is None else [bias])
    return Part(extension.Linear(matrix.record, rows_of(bias)), [matrix], tensors)


@torch.no_grad()
def norm_part(module: Any, name: str, dtype: torch.dtype) -> Part:
    """A root-mean-square norm.

    Raises:
        Declined: the module computes something else.
    """
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    other = Declined(f"its {name} is no root-mean-square norm with one weight a feature")
    if not isinstance(weight, Tensor) or not is_plain(weight) or not isinstance(epsilon, float):
        raise other
    if weight.ndim != 1 or list(module.parameters()) != [weight] or not weight.is_contiguous():
        raise other
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[0], generator=generator).to(dtype)
    expected = module(x).float()
    errors = {}
    for offset in (0.0, 1.0):
        for rounds_once in (False, True):
            error = (_norm(x, weight, epsilon, offset, rounds_once).float() - expected).norm()
            errors[offset, rounds_once] = float(error / expected.norm())
    (offset, rounds_once), error = min(errors.items(), key=lambda one: one[1])
    if not error <= _NORM_TOLERANCE[dtype]:
        raise other
    extension = native()
    assert extension is not None
    record = extension.Norm(rows_of(weight), weight.shape[0], epsilon, offset, rounds_once)
    return Part(record, [], [weight])


def _norm(
    x: Float[Tensor, "N D"], weight: Float[Tensor, " D"], epsilon: float, offset: float, rounds_once: bool
) -> Float[Tensor, "N D"]:
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    if not rounds_once:
        wide = wide.to(x.dtype).float()
    return (wide * (weight.float() + offset)).to(x.dtype)


@final
@dataclass(slots=True)
class AttentionShape:
    """What a caller must know of an attention: heads of keys and values, and the width of a head."""

    num_heads: int
    num_kv_heads: int
    width: int


def attention_parts(layer: Any, dtype: torch.dtype) -> tuple[AttentionShape, list[Part]]:
    """The norm and attention of a layer, once for each of `ROTATIONS`.

    Raises:
        Declined: they are of other kinds.
    """
    attention = layer.self_attn
    if others := others_in(attention, _ATTENTION_NAMES):
        raise Declined(f"its attention also uses {others}")
    if getattr(getattr(attention, "config", None), "clip_qkv", None) is not None:
        raise Declined("its attention clips queries, keys and values")
    width, scaling = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if not isinstance(width, int) or not isinstance(scaling, float):
        raise Declined("its attention names no width of a head or no scaling")
    linears = [linear_part(attention, name, dtype) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    norm = norm_part(layer.input_layernorm, "input_layernorm", dtype)
    q_out, k_out, v_out = (getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj"))
    if k_out != v_out or q_out % k_out or k_out % width or attention.o_proj.in_features != q_out:
        raise Declined("its queries, keys and values have other widths than so many heads each")
    norms = []
    for name, outputs in (("q_norm", q_out), ("k_norm", k_out)):
        module = getattr(attention, name, None)
        found = _empty_norm() if module is None else norm_part(module, name, dtype)
        if found.parameters and found.parameters[0].numel() not in (width, outputs):
            raise Declined(f"its {name} is neither as wide as a head nor as all of them")
        norms.append(found)
    known = [*linears, *norms]
    if not _covers(attention, known):
        raise Declined("its attention has parameters that have no place in the compiled one")
    extension = native()
    assert extension is not None
    made = []
    for rotation in ROTATIONS:
        records = [part.record for part in known]
        record = extension.Attention(norm.record, *records[4:], *records[:4], width, scaling, rotation)
        part = Part(record)
        part.take(norm, *known)
        made.append(part)
    return AttentionShape(q_out // width, k_out // width, width), made


def _empty_norm() -> Part:
    extension = native()
    assert extension is not None
    return Part(extension.Norm())


def mixture_part(layer: Any, dtype: torch.dtype) -> Part:
    """The second norm of a layer and what follows it: experts with a shared one or without, or an MLP.

    Raises:
        Declined: they are of other kinds.
    """
    norm = norm_part(layer.post_attention_layernorm, "post_attention_layernorm", dtype)
    extension = native()
    assert extension is not None
    block = layer.mlp
    if names_of(block) != _MLP_NAMES:
        return _mixture_of(block, norm, dtype)
    shared = shared_part(block, "MLP", dtype)
    if not _covers(block, [shared]):
        raise Declined("its MLP has parameters that have no place in the compiled one")
    nothing = extension.Activation(0, False, False, 1.0, 0.0, 0.0)
    idle = Part(extension.Mixture(norm.record, extension.Router(), None, nothing, shared.record))
    idle.take(norm, shared)
    return idle


def _mixture_of(block: Any, norm: Part, dtype: torch.dtype) -> Part:
    extension = native()
    assert extension is not None
    if others := others_in(block, _BLOCK_NAMES):
        raise Declined(f"its block of experts also uses {others}")
    experts = getattr(block, "experts", None)
    if not isinstance(experts, nn.Module) or not hasattr(experts, "is_transposed"):
        raise Declined("its experts do not follow transformers' common contract")
    math, layer = math_of(experts), experts_layer(experts)
    if layer is None:
        raise Declined("the compiled kernels cannot read its experts where they lie")
    if math.known is None or math.post is not None:
        raise Declined("its experts have an activation that is not known, or a norm behind them")
    if layer.features != layer.d_expert * (2 if math.known.gated else 1):
        raise Declined("its experts' matrices do not fit each other")
    router = find_router(block, experts, dtype)
    parts = [Part(router.record, [router], router.tensors)]
    name = next((name for name in _SHARED if getattr(block, name, None) is not None), None)
    if name is None:
        shared = Part(extension.Shared())
    else:
        switched = "shared_expert_gate" if getattr(block, "shared_expert_gate", None) is not None else None
        shared = shared_part(getattr(block, name), name, dtype, block, switched)
    parts.append(shared)
    if not _covers(block, parts, besides=experts):
        raise Declined("its block of experts has parameters that have no place in the compiled one")
    record = extension.Mixture(norm.record, router.record, layer.record, math.known.record(), shared.record)
    loads = loads_of(experts)
    if loads is not None:
        record.count(loads.data_ptr())
    made = Part(record, [layer, loads])
    made.take(norm, *parts)
    return made


def shared_part(
    module: Any, name: str, dtype: torch.dtype, block: Any = None, switched: str | None = None
) -> Part:
    """An MLP with a gate that runs on every token.

    ``switched`` names the linear layer of one output in ``block`` that weighs it, where there is one.

    Raises:
        Declined: it is of another kind.
    """
    if names_of(module) != _MLP_NAMES or not callable(getattr(module, "act_fn", None)):
        raise Declined(f"its {name} is no MLP with a gate")

    def activate(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        made: Tensor = module.act_fn(gate) * up
        return made

    known = recognise(activate, module, gated=True)
    if known is None:
        raise Declined(f"its {name} has an activation that is not known")
    extension = native()
    assert extension is not None
    parts = [linear_part(module, each, dtype) for each in ("gate_proj", "up_proj", "down_proj")]
    parts.append(Part(extension.Linear()) if switched is None else linear_part(block, switched, dtype))
    if switched is not None and getattr(block, switched).out_features != 1:
        raise Declined(f"its {switched} has several outputs")
    made = Part(extension.Shared(*(part.record for part in parts), known.record()))
    made.take(*parts)
    return made


def _covers(module: nn.Module, parts: list[Part], besides: nn.Module | None = None) -> bool:
    """Whether every parameter of a module is read by one of its parts."""
    left = {id(tensor) for tensor in module.parameters()}
    left -= {id(tensor) for part in parts for tensor in part.parameters}
    return left <= ({id(tensor) for tensor in besides.parameters()} if besides is not None else set())


def dtype_of(layer: nn.Module) -> torch.dtype | None:
    """The dtype of a layer's norm, where it is one that the kernels know."""
    weight = getattr(getattr(layer, "input_layernorm", None), "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in NUMBERS else None
