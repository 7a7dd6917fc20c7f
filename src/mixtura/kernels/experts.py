"""Run experts over sorted assignments without gradients: plain tensors or an `ExpertStore`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.kernels.activations import Activation
from mixtura.kernels.dispatch import Dispatch, Run, sum_by_token
from mixtura.kernels.matmul import lent_linear, linear, linear_into
from mixtura.kernels.records import AssignmentObserver, ExpertStore, ExpertTensors, LendingStore

# Weight elements up to which copying the chosen experts' weights together and multiplying them in one
# call is faster than one call for each expert: for 16-bit dtypes, whose kernels cost more to start, and
# for wider ones.
_FEW_ELEMENTS_16_BIT = 1 << 20
_FEW_ELEMENTS = 1 << 17
# Bytes of hidden features up to which the activation runs on all rows at once. More would leave the
# cache between the two matrices; less is mostly the cost of calling the activation for every expert.
_CACHED_BYTES = 4 << 20


@final
@dataclass(frozen=True, slots=True)
class ExpertMath:
    """What an expert computes around its two matrices.

    Attributes:
        activation: from the features of ``up`` to the inputs of ``down``, such as SwiGLU.
        transposed: the matrices are stored as [inputs, outputs].
        post: applied to the output before it is weighted, such as a norm.
        known: the formula that ``activation`` is, where it is one that the compiled kernels know.
    """

    activation: Callable[[Tensor], Tensor]
    transposed: bool = False
    post: Callable[[Tensor], Tensor] | None = None
    known: Activation | None = None

    def matrix(self, weight: Tensor) -> Tensor:
        """A view of ``weight`` (of one expert or several) as [..., outputs, inputs]."""
        return weight.mT if self.transposed else weight

    def hidden(self, x: Float[Tensor, "n D"], tensors: ExpertTensors) -> Float[Tensor, "n F"]:
        """What goes into an expert's second matrix."""
        return self.activation(linear(x, self.matrix(tensors.up), tensors.up_bias))

    def outputs(self, hidden: Float[Tensor, "n F"], tensors: ExpertTensors) -> Float[Tensor, "n D"]:
        """What an expert's second matrix makes of that, before weighting."""
        made = linear(hidden, self.matrix(tensors.down), tensors.down_bias)
        return made if self.post is None else self.post(made)


@final
class StackedExperts:
    """An `ExpertStore` of plain tensors, the experts along their first axis."""

    def __init__(
        self,
        up: Float[Tensor, "E _ _"],
        down: Float[Tensor, "_ _ _"],
        up_bias: Float[Tensor, "E _"] | None = None,
        down_bias: Float[Tensor, "E _"] | None = None,
    ) -> None:
        self.up = up
        self.down = down
        self.up_bias = up_bias
        self.down_bias = down_bias
        self.num_experts = up.shape[0]

    @property
    def like(self) -> ExpertTensors:
        """One expert, for its sizes."""
        return self.get(0, self.up.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that hold weights."""
        held = (self.up, self.down, self.up_bias, self.down_bias)
        return tuple(tensor for tensor in held if tensor is not None)

    def get(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """Views of one expert's weights, in the dtype they have."""
        return ExpertTensors(
            self.up[expert],
            self.down[expert],
            None if self.up_bias is None else self.up_bias[expert],
            None if self.down_bias is None else self.down_bias[expert],
        )


def run_experts(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, " n"],
    dispatch: Dispatch,
    store: ExpertStore,
    math: ExpertMath,
    observer: AssignmentObserver | None = None,
) -> Float[Tensor, "T D"]:
    """Every token's weighted sum of its experts' outputs. Not differentiable.

    ``weights`` are in the order of ``dispatch``. Every touched expert is read once, and none runs on
    a token that was not assigned to it. Of plain tensors, the experts' weights are read in place.
    """
    like = store.like if isinstance(store, StackedExperts | LendingStore) else None
    if like is None:
        outputs = _one_by_one(x, weights, dispatch, store, math, observer)
    elif observer is None and _are_few(dispatch, like):
        outputs = _together(x, dispatch, store, math)
    elif observer is None and _fit_in_cache(dispatch, like, math):
        outputs = _matrix_by_matrix(x, dispatch, store, like, math)
    else:
        outputs = _one_by_one(x.to(like.up.dtype), weights, dispatch, store, math, observer)
    return sum_by_token(outputs, dispatch, weights)


def _lender(
    store: ExpertStore, runs: Sequence[Run], x: Tensor | None, dtype: torch.dtype
) -> Callable[[int], ExpertTensors]:
    """What gives the experts of some runs one after the other, each until the next."""
    if not isinstance(store, LendingStore):
        return lambda expert: store.get(expert, dtype)
    store.expect([run.expert for run in runs], [run.stop - run.start for run in runs], x)
    return lambda expert: store.lend(expert, dtype)


def _one_by_one(
    x: Tensor,
    weights: Tensor,
    dispatch: Dispatch,
    store: ExpertStore,
    math: ExpertMath,
    observer: AssignmentObserver | None,
) -> Tensor:
    outputs = torch.empty(dispatch.num_rows, x.shape[1], dtype=x.dtype, device=x.device)
    lend = _lender(store, dispatch.runs, x, x.dtype)
    for expert, start, stop in dispatch.runs:
        token_ids = dispatch.rows[start:stop]
        inputs = x.index_select(0, token_ids)
        tensors = lend(expert)
        hidden = math.hidden(inputs, tensors)
        ran = outputs[start:stop]
        linear_into(ran, hidden, math.matrix(tensors.down), tensors.down_bias)
        if math.post is not None:
            ran.copy_(math.post(ran))
        if observer is not None:
            observer.expert(expert, token_ids, weights[start:stop], inputs, ran)
    return outputs


def _fit_in_cache(dispatch: Dispatch, like: ExpertTensors, math: ExpertMath) -> bool:
    features = math.matrix(like.up).shape[0]
    return dispatch.num_rows * features * like.up.element_size() <= _CACHED_BYTES


def _matrix_by_matrix(
    x: Tensor, dispatch: Dispatch, store: ExpertStore, like: ExpertTensors, math: ExpertMath
) -> Tensor:
    inputs, runs = x.index_select(0, dispatch.rows), dispatch.runs
    lend = _lender(store, runs, x, x.dtype)
    features, width = math.matrix(like.up).shape[0], math.matrix(like.down).shape[0]
    hidden = lent_linear(inputs, lambda e: (math.matrix((t := lend(e)).up), t.up_bias), features, runs)
    inputs = math.activation(hidden)
    # Those that were asked for last are the likeliest to be there still.
    lend_again = _lender(store, runs[::-1], None, x.dtype)
    outputs = lent_linear(
        inputs, lambda e: (math.matrix((t := lend_again(e)).down), t.down_bias), width, runs[::-1]
    )
    return outputs if math.post is None else math.post(outputs)


def _are_few(dispatch: Dispatch, like: ExpertTensors) -> bool:
    per_expert = like.up.numel() + like.down.numel()
    limit = _FEW_ELEMENTS_16_BIT if like.up.element_size() == 2 else _FEW_ELEMENTS
    return 0 < dispatch.num_rows * per_expert <= limit


def _together(x: Tensor, dispatch: Dispatch, store: ExpertStore, math: ExpertMath) -> Tensor:
    chosen = _gathered(store, dispatch, x)
    hidden = _row_by_row(x.index_select(0, dispatch.rows), chosen.up, chosen.up_bias, math)
    outputs = _row_by_row(math.activation(hidden), chosen.down, chosen.down_bias, math)
    return outputs if math.post is None else math.post(outputs)


def _gathered(store: ExpertStore, dispatch: Dispatch, x: Tensor) -> ExpertTensors:
    """Copies of the weights of each row's expert."""
    if isinstance(store, StackedExperts):
        experts = [run.expert for run in dispatch.runs for _ in range(run.start, run.stop)]
        ids = torch.tensor(experts, device=x.device)
        held = (store.up, store.down, store.up_bias, store.down_bias)
        return ExpertTensors(*(None if one is None else one.index_select(0, ids) for one in held))  # type: ignore[arg-type]
    lend = _lender(store, dispatch.runs, x, x.dtype)
    lent = [
        [None if one is None else one.expand(stop - start, *one.shape).clone() for one in lend(expert)]
        for expert, start, stop in dispatch.runs
    ]
    gathered = (None if parts[0] is None else torch.cat(parts) for parts in zip(*lent, strict=True))
    return ExpertTensors(*gathered)  # type: ignore[arg-type]


def _row_by_row(x: Tensor, weights: Tensor, biases: Tensor | None, math: ExpertMath) -> Tensor:
    chosen = math.matrix(weights)
    # Given where to write, the product is left alone by autocast.
    rows = chosen.new_empty(chosen.shape[0], chosen.shape[1], 1)
    torch.bmm(chosen, x.to(chosen.dtype).unsqueeze(2), out=rows)
    return rows.squeeze(2) if biases is None else rows.squeeze(2) + biases
