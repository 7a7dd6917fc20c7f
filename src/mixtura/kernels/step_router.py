"""Which router a block of experts has, found by comparing its choices and weights with the known formulas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from mixtura.kernels.compiled import NUMBERS, is_plain, native, rows_of
from mixtura.kernels.declined import Declined
from mixtura.kernels.matrices import dense_matrix
from mixtura.kernels.records import rehearsal

_NUM_TOKENS: Final = 16
# Of the norm of the weights; and the share of tokens whose choices may differ where logits are nearly equal.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
_MOST_DIFFERENT: Final = {torch.float32: 0, torch.bfloat16: 2}
# How far random corrections move scores: of sigmoids. Of softmaxes it is one over the number of experts.
_CORRECTION: Final = 0.2
_SCORES: Final = ("softmax of all", "softmax of the chosen", "sigmoid")


@final
@dataclass(slots=True)
class FoundRouter:
    """The extension's record of a router and the tensors that it reads."""

    record: Any
    tensors: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def find_router(block: Any, experts: Any, dtype: torch.dtype) -> FoundRouter:
    """The formula that chooses as ``block`` does on random tokens.

    Scores are corrected by random numbers meanwhile, not by the model's: by zeros, which a model may hold
    when it is looked at and not later, all formulas that correct do the same.

    Raises:
        Declined: none of the known formulas does.
    """
    module = getattr(block, "gate", None) or getattr(block, "router", None)
    num_experts = int(experts.num_experts)
    weight, bias, corrections = _tensors(block, module, experts, num_experts)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _NUM_TOKENS, weight.shape[1], generator=generator).to(dtype)
    logits = hidden[0].float() @ weight.float().T
    if bias is not None:
        logits += bias.float()
    linear = _linear(weight, bias)
    trials = [
        _Trial.of(block, experts, hidden, {
            name: (torch.rand(t.shape, generator=generator) * size).to(t.dtype)
            for name, t in corrections.items()
        })
        for size in ((_CORRECTION, 1 / num_experts) if corrections else (0.0,))
    ]  # fmt: skip
    top_k = trials[0].top_k
    scales = {1.0, *(float(trial.expected.sum(-1).mean()) for trial in trials)}
    scales |= {float(v) for v in _numbers(block, module) if isinstance(v, float) and v > 0}
    best: tuple[float, tuple[Any, ...]] | None = None
    for formula in _formulas(top_k, sorted(scales)):
        error = max(trial.error(linear, formula, logits, dtype) for trial in trials)
        if best is None or error < best[0]:
            best = error, formula
    if best is None or not best[0] <= _TOLERANCE[dtype]:
        raise Declined("its router chooses or weighs experts by no formula that the compiled kernels know")
    held = [tensor.reshape(-1) for tensor in corrections.values()]
    extension = native()
    assert extension is not None
    record = extension.Router(linear, rows_of(held[0] if held else None), *best[1])
    return FoundRouter(record, [weight, *([] if bias is None else [bias]), *corrections.values(), *held])


def _tensors(
    block: Any, module: Any, experts: Any, num_experts: int
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """The router's weight, the bias of its logits, and by name what may correct scores for the choice."""
    if not isinstance(module, nn.Module):
        raise Declined("its router is no module named gate or router")
    named = [*module.named_parameters(), *module.named_buffers()]
    weights = [t for _, t in named if t.ndim == 2 and t.shape[0] == num_experts]
    biases = [t for name, t in named if name.rpartition(".")[2] == "bias" and t.shape == (num_experts,)]
    own = {id(tensor) for tensor in experts.parameters()}
    others = {
        name: tensor
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
        if "correction" in name and tensor.numel() == num_experts and id(tensor) not in own
    }
    if len(weights) != 1 or len(biases) > 1 or len(others) > 1:
        raise Declined("its router has not one matrix, at most one bias and at most one correction of scores")
    tensors = (weights[0], *biases, *others.values())
    if not is_plain(*tensors) or any(not tensor.is_contiguous() for tensor in tensors):
        raise Declined("its router's tensors are not contiguous float32 or bfloat16 on the processor")
    return weights[0], biases[0] if biases else None, others


def _numbers(block: Any, module: Any) -> Iterator[Any]:
    for holder in (block, module):
        yield from (value for name, value in vars(holder).items() if "scal" in name)


def _choices(
    block: Any, experts: nn.Module, hidden: Float[Tensor, "1 T D"], corrections: dict[str, Tensor]
) -> tuple[Int[Tensor, "T K"], Tensor]:
    """What reaches the experts when the block runs on ``hidden`` with these corrections."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = (*given, *(named[name] for name in ("top_k_index", "top_k_weights") if name in named))
        if len(values) == 3:
            seen.append((values[1], values[2]))

    handle = experts.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with rehearsal(experts):
            functional_call(block, corrections, (hidden,))
    finally:
        handle.remove()
    if len(seen) == 1 and seen[0][0].shape == seen[0][1].shape and seen[0][0].ndim == 2:
        ids, weights = seen[0]
        if ids.shape[0] == hidden.shape[1]:
            return ids, weights
    raise Declined("its router hands its experts something else than as many choices and weights a token")


@final
@dataclass(frozen=True, slots=True)
class _Trial:
    """What a router does with random tokens, and the corrections of scores it did that with.

    Attributes:
        expected: weights of all experts, 0 for those that were not chosen.
        top_k: experts that were chosen for each token.
        correction: of scores, one for each expert; None where there is none.
    """

    expected: Float[Tensor, "T E"]
    top_k: int
    correction: Float[Tensor, " E"] | None

    @staticmethod
    def of(block: Any, experts: Any, hidden: Tensor, corrections: dict[str, Tensor]) -> _Trial:
        ids, weights = _choices(block, experts, hidden, corrections)
        correction = next((tensor.reshape(-1) for tensor in corrections.values()), None)
        return _Trial(_spread(ids, weights, int(experts.num_experts)), ids.shape[1], correction)

    def error(self, linear: Any, formula: tuple[Any, ...], logits: Tensor, dtype: torch.dtype) -> float:
        """Relative error of the weights where the same experts are chosen; infinite where too few agree."""
        num_tokens = logits.shape[0]
        ids = torch.empty(num_tokens, self.top_k, dtype=torch.int64)
        weights = torch.empty(num_tokens, self.top_k)
        extension = native()
        assert extension is not None
        record = extension.Router(linear, rows_of(self.correction), *formula)
        extension.choose(
            record, NUMBERS[dtype], logits.data_ptr(), num_tokens, ids.data_ptr(), weights.data_ptr()
        )
        expected = self.expected
        made = _spread(ids, weights, expected.shape[1])
        same = ((made != 0) == (expected != 0)).all(-1)
        if int((~same).sum()) > _MOST_DIFFERENT[dtype]:
            return float("inf")
        error = float((made - expected)[same].norm() / expected[same].norm())
        return error if error == error else float("inf")


def _spread(ids: Int[Tensor, "T K"], weights: Tensor, num_experts: int) -> Float[Tensor, "T E"]:
    return torch.zeros(ids.shape[0], num_experts).scatter_(1, ids.long(), weights.float())


def _linear(weight: Tensor, bias: Tensor | None) -> Any:
    extension, matrix = native(), dense_matrix(weight)
    assert extension is not None
    if matrix is None:
        raise Declined("its router's matrix lies in memory neither by row nor by column")
    return extension.Linear(matrix.record, rows_of(bias))


def _formulas(top_k: int, scales: list[float]) -> Iterator[tuple[Any, ...]]:
    """What the extension's record of a router says beside its tensors, in each way."""
    flags = (False, True)
    for scores, normed, scale, logits, weights in product(range(len(_SCORES)), flags, scales, flags, flags):
        yield top_k, scores, normed, scale, logits, weights
