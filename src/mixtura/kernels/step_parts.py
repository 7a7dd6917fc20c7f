"""The parts of a decoder layer that one compiled call can run, found by their names, shapes and numbers.

Nothing here knows a family. A part is taken where its ``forward`` names nothing but what is known, and
every parameter has its place; whether it then computes the same is for `step_trial` to try.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.kernels.activations import recognise
from mixtura.kernels.backend import experts_layer, math_of
from mixtura.kernels.compiled import NUMBERS, is_plain, native, rows_of
from mixtura.kernels.linears import FewRowsLinear, PackedLinear
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


def nothing() -> Any:
    """The extension's record of no tensor."""
    return rows_of(None)


def linear_part(module: Any, dtype: torch.dtype) -> Part | None:
    """A linear layer of any width; None where the kernels cannot read it."""
    if type(module) in (nn.Linear, FewRowsLinear):
        matrix = dense_matrix(module.weight) if module.weight.dtype == dtype else None
    elif type(module) is PackedLinear:
        matrix = module.matrix()
    else:
        return None
    bias = module.bias
    if matrix is None or (bias is not None and not (is_plain(bias) and bias.is_contiguous())):
        return None
    extension = native()
    assert extension is not None
    tensors = [*matrix.holds] + ([] if bias is None else [bias])
    return Part(extension.Linear(matrix.record, rows_of(bias)), [matrix], tensors)


@torch.no_grad()
def norm_part(module: Any, dtype: torch.dtype) -> Part | None:
    """A root-mean-square norm; None where the module computes something else."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not is_plain(weight) or not isinstance(epsilon, float):
        return None
    if weight.ndim != 1 or list(module.parameters()) != [weight] or not weight.is_contiguous():
        return None
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
        return None
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


def attention_parts(layer: Any, dtype: torch.dtype) -> tuple[AttentionShape, list[Part]] | None:
    """The norm and attention of a layer, once for each of `ROTATIONS`; None where they are of other kinds."""
    attention = layer.self_attn
    clip = getattr(getattr(attention, "config", None), "clip_qkv", None)
    if not names_of(attention) <= _ATTENTION_NAMES or clip is not None:
        return None
    width, scaling = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if not isinstance(width, int) or not isinstance(scaling, float):
        return None
    linears = [
        linear_part(getattr(attention, name, None), dtype)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    norm = norm_part(layer.input_layernorm, dtype)
    if norm is None:
        return None
    q_out, k_out, v_out = (getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj"))
    norms = []
    for name, outputs in (("q_norm", q_out), ("k_norm", k_out)):
        module = getattr(attention, name, None)
        found = _empty_norm() if module is None else norm_part(module, dtype)
        if found is None or (found.parameters and found.parameters[0].numel() not in (width, outputs)):
            return None
        norms.append(found)
    if k_out != v_out or q_out % k_out or k_out % width or attention.o_proj.in_features != q_out:
        return None
    known = [part for part in (*linears, *norms) if part is not None]
    if len(known) != len(linears) + len(norms) or not _covers(attention, known):
        return None
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


def mixture_part(layer: Any, dtype: torch.dtype) -> Part | None:
    """The second norm of a layer and what follows it: experts with a shared one or without, or an MLP."""
    norm = norm_part(layer.post_attention_layernorm, dtype)
    extension = native()
    assert extension is not None
    if norm is None:
        return None
    block = layer.mlp
    if names_of(block) == _MLP_NAMES:
        shared = shared_part(block, None, dtype)
        if shared is None or not _covers(block, [shared]):
            return None
        idle = Part(
            extension.Mixture(
                norm.record,
                extension.Router(),
                None,
                extension.Activation(0, False, False, 1.0, 0.0, 0.0),
                shared.record,
            )
        )
        idle.take(norm, shared)
        return idle
    return _mixture_of(block, norm, dtype) if names_of(block) <= _BLOCK_NAMES else None


def _mixture_of(block: Any, norm: Part, dtype: torch.dtype) -> Part | None:
    extension = native()
    assert extension is not None
    experts = getattr(block, "experts", None)
    if not isinstance(experts, nn.Module) or not hasattr(experts, "is_transposed"):
        return None
    math, layer = math_of(experts), experts_layer(experts)
    if layer is None or math.known is None or math.post is not None:
        return None
    if layer.features != layer.d_expert * (2 if math.known.gated else 1):
        return None
    router = find_router(block, experts, dtype)
    if router is None:
        return None
    parts = [Part(router.record, [router], router.tensors)]
    shared: Part | None = Part(extension.Shared())
    module = next((getattr(block, name) for name in _SHARED if getattr(block, name, None) is not None), None)
    if module is not None:
        shared = shared_part(module, getattr(block, "shared_expert_gate", None), dtype)
    if shared is None:
        return None
    parts.append(shared)
    if not _covers(block, parts, besides=experts):
        return None
    record = extension.Mixture(norm.record, router.record, layer.record, math.known.record(), shared.record)
    made = Part(record, [layer])
    made.take(norm, *parts)
    return made


def shared_part(module: Any, switched: Any, dtype: torch.dtype) -> Part | None:
    """An MLP with a gate that runs on every token; ``switched`` is a linear layer of one output, or None."""
    if names_of(module) != _MLP_NAMES or not callable(getattr(module, "act_fn", None)):
        return None

    def activate(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        made: Tensor = module.act_fn(gate) * up
        return made

    known = recognise(activate, module, gated=True)
    linears = [
        linear_part(getattr(module, name, None), dtype) for name in ("gate_proj", "up_proj", "down_proj")
    ]
    extension = native()
    assert extension is not None
    one = Part(extension.Linear()) if switched is None else linear_part(switched, dtype)
    parts = [part for part in (*linears, one) if part is not None]
    if known is None or len(parts) != 4 or (switched is not None and switched.out_features != 1):
        return None
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
