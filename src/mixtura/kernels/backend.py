"""The experts backend ``"mixtura"`` of transformers: any model of the common experts contract.

``AutoModelForCausalLM.from_pretrained(path, experts_implementation="mixtura")`` works once
`register` has been called; importing this module does so, and so does everything in mixtura that
opens models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mixtura.errors import UserError
from mixtura.kernels.activations import PARAMETERS, Activation, recognise
from mixtura.kernels.compiled import is_recorded, why_not_native
from mixtura.kernels.experts import ExpertMath, StackedExperts
from mixtura.kernels.few import NativeLayer, layer_of, run_few
from mixtura.kernels.loads import count, loads_of
from mixtura.kernels.records import AssignmentObserver, ExpertExchange, ExpertStore
from mixtura.kernels.routed import run_routed
from mixtura.types import Change, MatrixShape

NAME = "mixtura"


def register() -> None:
    """Make ``experts_implementation="mixtura"`` known to transformers. Calling it again is harmless."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)


def forward(
    self: nn.Module,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """Run the experts module ``self`` of a transformers model, whatever its layout.

    A choice outside [0, E) is absent: it adds nothing and gets no gradient. Where the module has an
    attribute ``mixtura_store`` (an `ExpertStore`) the experts are read from it, else they are the
    module's own parameters; where it has ``mixtura_observer`` (an `AssignmentObserver`) that is told
    what each expert does; where it has ``mixtura_exchange`` (an `ExpertExchange`) that brings tokens
    to wherever experts are.
    """
    return run_module(self, hidden_states, top_k_index, top_k_weights)


def run_module(
    module: Any,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
    changes: Sequence[Change] = (),
) -> Float[Tensor, "T D"]:
    """`forward` of an experts module, its matrices as adapters change them."""
    if hidden_states.is_meta:
        return torch.empty_like(hidden_states)
    observer: AssignmentObserver | None = getattr(module, "mixtura_observer", None)
    store: ExpertStore | None = getattr(module, "mixtura_store", None)
    loads = loads_of(module)
    if loads is not None:
        count(loads, top_k_index)
    exchange: ExpertExchange | None = getattr(module, "mixtura_exchange", None)
    if exchange is not None:
        return _exchanged(
            exchange, hidden_states, top_k_index, top_k_weights, alone=not (observer or changes)
        )
    math = math_of(module)
    source = parameters_of(module) if store is None else store
    needs_grad = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden_states, top_k_weights, *module.parameters())
    )
    if observer is None and not needs_grad and not changes:
        found = run_few(hidden_states, top_k_index, top_k_weights, source, math)
        if found is not None:
            return found
    token_ids = _tokens_of(top_k_index)
    if observer is not None:
        observer.start(hidden_states, top_k_index, top_k_weights)
    outputs = run_routed(
        hidden_states,
        token_ids,
        top_k_index.reshape(-1),
        top_k_weights.reshape(-1),
        source,
        math,
        observer,
        tuple(module.parameters()) if torch.is_grad_enabled() else (),
        changes,
    )
    if observer is not None:
        observer.finish()
    return outputs


def _tokens_of(top_k_index: Int[Tensor, "T K"]) -> Int[Tensor, " N"]:
    num_tokens, num_chosen = top_k_index.shape
    return torch.arange(num_tokens * num_chosen, device=top_k_index.device) // num_chosen


def _exchanged(
    exchange: ExpertExchange,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    alone: bool,
) -> Tensor:
    if not alone:
        raise UserError(
            "experts that lie on several processes cannot be observed or have adapters; load the model on "
            "one process for that"
        )
    tokens = _tokens_of(top_k_index)
    return exchange(hidden_states, tokens, top_k_index.reshape(-1), top_k_weights.reshape(-1))


def experts_layer(module: Any) -> NativeLayer | None:
    """The experts of a transformers module as the compiled kernels read them; None where they cannot."""
    store = getattr(module, "mixtura_store", None)
    return layer_of(parameters_of(module) if store is None else store, math_of(module))


def why_not_compiled(module: Any) -> str:
    """Why the experts of a transformers module do not run few tokens by the compiled kernels, or nothing."""
    if missing := why_not_native():
        return missing
    implementation = module.config._experts_implementation
    if implementation != NAME:
        return f"its experts are to run by the implementation {implementation!r}"
    if getattr(module, "mixtura_observer", None) is not None:
        return "an observer watches its experts"
    if experts_layer(module) is None:
        return "the compiled kernels cannot read its experts where they lie"
    return ""


def math_of(module: Any) -> ExpertMath:
    """What the experts of a transformers module compute around their two matrices."""
    activation = module._apply_gate if module.has_gate else module.act_fn
    post = module.post_expert_norm if module.has_post_expert_norm else None
    return ExpertMath(activation, module.is_transposed, post, _known_activation(module, activation))


# By module: what it was found to compute, and what that was found from.
_known: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Activation | None]] = WeakKeyDictionary()


def _known_activation(module: Any, activation: Callable[[Tensor], Tensor]) -> Activation | None:
    if is_recorded():
        return None
    # Looked up where modules keep them: a name that is not there would cost an exception.
    own, parts = vars(module), module._modules
    act = parts.get("act_fn", own.get("act_fn"))
    basis = (act, *(own.get(name) for name in PARAMETERS), getattr(activation, "__func__", activation))
    if isinstance(act, nn.Module):
        basis += (type(act).forward, *(v for v in act.__dict__.values() if isinstance(v, int | float | str)))
    found = _known.get(module)
    if found is None or found[0] != basis:
        found = basis, recognise(activation, module, gated=module.has_gate)
        _known[module] = found
    return found[1]


def matrix_shapes(module: Any) -> tuple[int, dict[str, MatrixShape]]:
    """How many experts a module of transformers has, and the sizes of their matrices ``up`` and ``down``."""
    transposed = bool(module.is_transposed)
    shapes = {}
    for name, parameter in matrix_names(module).items():
        count, first, second = getattr(module, parameter).shape
        rows, cols = (second, first) if transposed else (first, second)
        shapes[name] = MatrixShape(rows, cols, transposed)
    return count, shapes


def matrix_names(module: Any) -> dict[str, str]:
    """The parameters of a transformers module that hold its experts' two matrices."""
    return {"up": "gate_up_proj" if module.has_gate else "up_proj", "down": "down_proj"}


def parameters_of(module: Any) -> StackedExperts:
    """The experts of a transformers module that are its own parameters, in place."""
    name = matrix_names(module)["up"]
    return StackedExperts(
        getattr(module, name),
        module.down_proj,
        getattr(module, f"{name}_bias") if module.has_bias else None,
        module.down_proj_bias if module.has_bias else None,
    )


register()
