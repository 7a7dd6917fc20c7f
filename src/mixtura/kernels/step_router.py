"""Which router a block of experts has, found by comparing its choices and weights with the known formulas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.kernels.compiled import NUMBERS, is_plain, native, rows_of
from mixtura.kernels.matrices import dense_matrix

_NUM_TOKENS: Final = 16
# Of the norm of the weights; and the share of tokens whose choices may differ where logits are nearly equal.
_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
_MOST_DIFFERENT: Final = {torch.float32: 0, torch.bfloat16: 2}
_SCORES: Final = ("softmax of all", "softmax of the chosen", "sigmoid")


@final
@dataclass(slots=True)
class FoundRouter:
    """The extension's record of a router and the tensors that it reads."""

    record: Any
    tensors: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def find_router(block: Any, experts: Any, dtype: torch.dtype) -> FoundRouter | None:
    """The formula that chooses as ``block`` does on random tokens; None where none of the known does."""
    module = getattr(block, "gate", None) or getattr(block, "router", None)
    num_experts = int(experts.num_experts)
    tensors = _tensors(block, module, experts, num_experts)
    if tensors is None:
        return None
    weight, bias, corrections = tensors
    width = weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _NUM_TOKENS, width, generator=generator).to(dtype)
    seen = _choices(block, experts, hidden)
    if seen is None:
        return None
    ids, weights = seen
    logits = hidden[0].float() @ weight.float().T
    if bias is not None:
        logits += bias.float()
    expected = _spread(ids, weights, num_experts)
    scales = {1.0, float(weights.float().sum(-1).mean())}
    scales |= {float(v) for v in _numbers(block, module) if isinstance(v, float) and v > 0}
    best: tuple[float, Any] | None = None
    for record in _candidates(weight, bias, corrections, ids.shape[1], sorted(scales)):
        error = _error(record, logits, expected, ids.shape[1], dtype)
        if error is not None and (best is None or error < best[0]):
            best = error, record
    if best is None or not best[0] <= _TOLERANCE[dtype]:
        return None
    return FoundRouter(best[1], [weight, *([] if bias is None else [bias]), *corrections])


def _tensors(
    block: Any, module: Any, experts: Any, num_experts: int
) -> tuple[Tensor, Tensor | None, list[Tensor]] | None:
    """The router's weight, the bias of its logits, and what may correct scores for the choice."""
    if not isinstance(module, nn.Module):
        return None
    named = [*module.named_parameters(), *module.named_buffers()]
    weights = [t for _, t in named if t.ndim == 2 and t.shape[0] == num_experts]
    biases = [t for name, t in named if name.rpartition(".")[2] == "bias" and t.shape == (num_experts,)]
    own = {id(tensor) for tensor in experts.parameters()}
    others = [
        tensor
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
        if "correction" in name and tensor.numel() == num_experts and id(tensor) not in own
    ]
    if len(weights) != 1 or len(biases) > 1 or len(others) > 1:
        return None
    tensors = (weights[0], *biases, *others)
    if not is_plain(*tensors) or any(not tensor.is_contiguous() for tensor in tensors):
        return None
    return weights[0], biases[0] if biases else None, [tensor.reshape(-1) for tensor in others]


def _numbers(block: Any, module: Any) -> Iterator[Any]:
    for holder in (block, module):
        yield from (value for name, value in vars(holder).items() if "scal" in name)


def _choices(
    block: Any, experts: nn.Module, hidden: Float[Tensor, "1 T D"]
) -> tuple[Int[Tensor, "T K"], Tensor] | None:
    """What reaches the experts when the block runs on ``hidden``."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = (*given, *(named[name] for name in ("top_k_index", "top_k_weights") if name in named))
        if len(values) == 3:
            seen.append((values[1], values[2]))

    handle = experts.register_forward_pre_hook(look, with_kwargs=True)
    try:
        block(hidden)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0][0].shape != seen[0][1].shape or seen[0][0].ndim != 2:
        return None
    ids, weights = seen[0]
    return (ids, weights) if ids.shape[0] == hidden.shape[1] else None


def _spread(ids: Int[Tensor, "T K"], weights: Tensor, num_experts: int) -> Float[Tensor, "T E"]:
    return torch.zeros(ids.shape[0], num_experts).scatter_(1, ids.long(), weights.float())


def _candidates(
    weight: Tensor, bias: Tensor | None, corrections: list[Tensor], top_k: int, scales: list[float]
) -> Iterator[Any]:
    extension, matrix = native(), dense_matrix(weight)
    if matrix is None or extension is None or weight.dtype not in NUMBERS:
        return
    linear = extension.Linear(matrix.record, rows_of(bias))
    correction = rows_of(corrections[0] if corrections else None)
    flags = (False, True)
    for scores, normed, scale, logits, weights in product(range(len(_SCORES)), flags, scales, flags, flags):
        yield extension.Router(linear, correction, top_k, scores, normed, scale, logits, weights)


def _error(
    record: Any, logits: Tensor, expected: Float[Tensor, "T E"], top_k: int, dtype: torch.dtype
) -> float | None:
    """Relative error of the weights where the same experts are chosen; None where too few tokens agree."""
    num_tokens = logits.shape[0]
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
    weights = torch.empty(num_tokens, top_k)
    extension = native()
    assert extension is not None
    extension.choose(
        record, NUMBERS[dtype], logits.data_ptr(), num_tokens, ids.data_ptr(), weights.data_ptr()
    )
    made = _spread(ids, weights, expected.shape[1])
    same = ((made != 0) == (expected != 0)).all(-1)
    if int((~same).sum()) > _MOST_DIFFERENT[dtype]:
        return None
    return float((made - expected)[same].norm() / expected[same].norm())
