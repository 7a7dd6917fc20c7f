"""A mixture of experts from plain tensors: who goes where with what weight, and the experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.kernels.adapted import adapted_product, tensors_of
from mixtura.kernels.dispatch import sort_by_expert
from mixtura.kernels.experts import ExpertMath, StackedExperts, run_experts
from mixtura.kernels.few import run_few
from mixtura.kernels.records import AssignmentObserver, ExpertStore
from mixtura.kernels.stored import run_stored_with_grad
from mixtura.kernels.training import run_experts_with_grad
from mixtura.types import Change


def routed_experts(
    x: Float[Tensor, "T D"],
    token_ids: Int[Tensor, " N"],
    expert_ids: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    up: Float[Tensor, "E _ _"],
    down: Float[Tensor, "_ _ _"],
    *,
    activation: Callable[[Tensor], Tensor],
    up_bias: Float[Tensor, "E _"] | None = None,
    down_bias: Float[Tensor, "E _"] | None = None,
    transposed: bool = False,
    post: Callable[[Tensor], Tensor] | None = None,
    observer: AssignmentObserver | None = None,
) -> Float[Tensor, "T D"]:
    """Run a mixture of experts: every token's weighted sum of the outputs of its experts.

    Assignment i sends token ``token_ids[i]`` to expert ``expert_ids[i]`` with ``weights[i]``, in any
    order and any number for each token; one whose expert id lies outside [0, E) is absent: it adds
    nothing and gets no gradient. Expert e computes
    ``activation(x @ up[e].T + up_bias[e]) @ down[e].T + down_bias[e]``, then ``post``.

    Differentiable, once, in ``x``, ``weights``, the experts' tensors and whatever ``activation`` and
    ``post`` hold. The same call with the same number of threads gives the same bits.

    Args:
        x: tokens, of any strides.
        token_ids: token of each assignment.
        expert_ids: expert of each assignment.
        weights: factor of each assignment's output; its dtype may differ from that of ``x``.
        up: first matrices, [E, features, D], or [E, D, features] where ``transposed``.
        down: second matrices, [E, D, F], or [E, F, D] where ``transposed``.
        activation: from [n, features] to [n, F], such as SwiGLU; applied to rows of many experts.
        up_bias: [E, features].
        down_bias: [E, D].
        transposed: the matrices are stored as [inputs, outputs].
        post: applied to outputs before they are weighted, such as a norm.
        observer: told what each expert did.

    Raises:
        UserError: the sizes of the tensors do not fit each other, or a token id lies outside [0, T).

    >>> eye = torch.eye(2).expand(3, 2, 2)
    >>> one, two = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2])
    >>> x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    >>> routed_experts(x, one, two, torch.tensor([1.0, 0.5, 0.25]), eye, eye, activation=torch.relu)
    tensor([[1.0000, 0.0000],
            [2.2500, 3.0000]])
    """
    store = StackedExperts(up, down, up_bias, down_bias)
    _check_sizes(x, token_ids, store, transposed)
    math = ExpertMath(activation, transposed, post)
    modules = [part for part in (activation, post) if isinstance(part, nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return run_routed(x, token_ids, expert_ids, weights, store, math, observer, parameters)


def run_routed(
    x: Float[Tensor, "T D"],
    token_ids: Int[Tensor, " N"],
    expert_ids: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    store: ExpertStore,
    math: ExpertMath,
    observer: AssignmentObserver | None = None,
    parameters: Sequence[Tensor] = (),
    changes: Sequence[Change] = (),
) -> Float[Tensor, "T D"]:
    """`routed_experts` on a store of any kind; ``parameters`` are those the experts hold elsewhere.

    ``changes`` are what adapters make of the experts' matrices.
    """
    if changes:
        return _run_adapted(x, token_ids, expert_ids, weights, store, math, observer, changes)
    stacked = store.tensors() if isinstance(store, StackedExperts) else ()
    needs_grad = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, weights, *stacked, *parameters)
    )
    if observer is None and not needs_grad:
        found = run_few(x, expert_ids, weights, store, math, token_ids)
        if found is not None:
            return found
    dispatch = sort_by_expert(token_ids, expert_ids, num_tokens=x.shape[0], num_experts=store.num_experts)
    present = weights.index_select(0, dispatch.assignments)
    if not needs_grad:
        outputs = run_experts(x, present, dispatch, store, math, observer)
    elif isinstance(store, StackedExperts):
        outputs = run_experts_with_grad(x, present, dispatch, store, math, observer)
    else:
        outputs = run_stored_with_grad(x, present, dispatch, store, math, observer, parameters)
    return outputs.to(x.dtype)


def _run_adapted(
    x: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    store: ExpertStore,
    math: ExpertMath,
    observer: AssignmentObserver | None,
    changes: Sequence[Change],
) -> Tensor:
    dispatch = sort_by_expert(token_ids, expert_ids, num_tokens=x.shape[0], num_experts=store.num_experts)
    present = weights.index_select(0, dispatch.assignments)
    if isinstance(store, StackedExperts):
        multiply = adapted_product(changes)
        return run_experts_with_grad(x, present, dispatch, store, math, observer, multiply).to(x.dtype)
    if any(change.dropout > 0 for change in changes):
        raise UserError(
            "experts that are read from a store cannot be tuned with dropout, because each runs twice; set "
            "the adapter's dropout to 0"
        )
    trained = [tensor for change in changes for tensor in tensors_of(change)]
    outputs = run_stored_with_grad(x, present, dispatch, store, math, observer, (), changes, trained)
    return outputs.to(x.dtype)


def _check_sizes(x: Tensor, token_ids: Tensor, store: StackedExperts, transposed: bool) -> None:
    width = x.shape[1]
    reads, makes = (1, 2) if transposed else (2, 1)
    if store.up.shape[reads] != width or store.down.shape[makes] != width:
        raise UserError(
            f"experts must read and make vectors as wide as the tokens, {width}; up reads "
            f"{store.up.shape[reads]} and down makes {store.down.shape[makes]} (transposed={transposed})"
        )
    if store.up.shape[0] != store.down.shape[0]:
        raise UserError(
            f"up and down must hold as many experts, got {store.up.shape[0]} and {store.down.shape[0]}"
        )
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < x.shape[0]:
        raise UserError(
            f"token_ids must lie in [0, {x.shape[0]}), got {token_ids.min()} to {token_ids.max()}"
        )
