"""Looking into a family's own router while it runs: its logits, and the choice it makes.

Routers of transformers have no common interface but two operations: a product with a matrix that has a
row per expert, and `torch.topk` over experts. Both are met here, whatever the family does around them
(sigmoids, groups, corrections, scaling), so that the choice can be changed and the rest stays its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mixtura.types.steering import Steering

AtProduct = Callable[[Tensor, Tensor], None]


@final
@dataclass(frozen=True, slots=True)
class Outline:
    """What tells a router's operations apart: its matrix, E, K, and its groups of experts."""

    matrix: tuple[int, int]
    num_experts: int
    top_k: int
    num_groups: int
    top_groups: int


@final
class Inside(TorchFunctionMode):
    """While a router runs in this context, its product is seen and its choice is steered.

    Attributes:
        features: what was multiplied with the router's matrix; None where nothing was.
        logits: the product.
        at_product: what to do at the product, while the router's own parameters are there, with the
            features and the matrix as they were multiplied.
        num_choices: how often experts were chosen by `torch.topk`.
    """

    def __init__(self, outline: Outline, steering: Steering, at_product: AtProduct | None = None) -> None:
        super().__init__()
        self.at_product = at_product
        self._outline = outline
        self._steering = steering
        self.features: Tensor | None = None
        self.logits: Tensor | None = None
        self.num_choices = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``, observed or steered where it is one of the two operations."""
        options = dict(kwargs or {})
        if func in (torch.topk, Tensor.topk):
            return self._topk(func, args, options)
        result = func(*args, **options)
        if self.logits is None and (matrix := self._multiplied(func, args)) is not None:
            if self._steering.changes_logits:
                result = steered_logits(result, self._steering, self._outline.num_experts)
            self.features, self.logits = args[0], result
            if self.at_product is not None:
                self.at_product(args[0], matrix)
        return result

    def _multiplied(self, func: Any, args: Sequence[Any]) -> Float[Tensor, "E D"] | None:
        """The router's matrix, where this is the product with it."""
        if func is F.linear:
            found, shape = args[1], self._outline.matrix
        elif func in (torch.mm, Tensor.mm, torch.matmul, Tensor.matmul):
            found, shape = args[1], self._outline.matrix[::-1]
        else:
            return None
        if tuple(found.shape) != shape:
            return None
        assert isinstance(found, Tensor)
        return found if func is F.linear else found.T

    def _topk(self, func: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        scores = args[0]
        count = options.get("k", args[1] if len(args) > 1 else None)
        if self._is_choice(scores, count):
            self.num_choices += 1
            return self._steered(func, args, options)
        if self._steering.forced is not None and self._is_choice_of_groups(scores, count):
            return func(self._with_forced_groups(scores), *args[1:], **options)
        return func(*args, **options)

    def _is_choice(self, scores: Tensor, count: int | None) -> bool:
        outline = self._outline
        plain = scores.ndim == 2 and scores.shape[-1] == outline.num_experts
        # A matrix with further rows (a class that skips the experts) is chosen from as a whole.
        larger = scores.shape[-1] == outline.matrix[0] > outline.num_experts
        return count == outline.top_k and (plain or larger)

    def _is_choice_of_groups(self, scores: Tensor, count: int | None) -> bool:
        outline = self._outline
        grouped = 1 < outline.num_groups < outline.num_experts and count == outline.top_groups
        return grouped and scores.ndim == 2 and scores.shape[-1] == outline.num_groups

    def _steered(self, func: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        scores, steering = args[0], self._steering
        if not steering.changes_choice:
            return func(*args, **options)
        # Some families choose row by row of the batch; a steering is by token.
        wanted = scores.detach().reshape(-1, scores.shape[-1])
        extra = wanted.shape[-1] - self._outline.num_experts
        if steering.bias is not None:
            wanted = wanted + F.pad(steering.bias.to(wanted), (0, extra))
        if steering.allowed is not None:
            wanted = wanted.masked_fill(~F.pad(steering.allowed, (0, extra), value=True), -torch.inf)
        if steering.ranks is None:
            chosen = func(wanted, *args[1:], **options).indices
        else:
            # Places are counted in falling order, which some families do not ask for.
            most = max(self._outline.top_k, int(steering.ranks[..., 1].max()))
            chosen = torch.topk(wanted, min(most, self._outline.num_experts), dim=-1).indices
        if steering.forced is not None:
            forced = steering.forced.view(chosen.shape)
            chosen = torch.where(forced >= 0, forced, chosen)
        chosen = chosen.view(*scores.shape[:-1], chosen.shape[-1])
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))

    def _with_forced_groups(self, ratings: Float[Tensor, "T G"]) -> Float[Tensor, "T G"]:
        """The groups' ratings, infinite for those that hold a forced expert."""
        forced = self._steering.forced
        assert forced is not None
        size = self._outline.num_experts // self._outline.num_groups
        groups = torch.where(forced >= 0, forced // size, self._outline.num_groups)
        held = ratings.new_zeros(ratings.shape[0], ratings.shape[1] + 1, dtype=torch.bool)
        return ratings.masked_fill(held.scatter(1, groups, True)[:, :-1], torch.inf)


def steered_logits(
    logits: Float[Tensor, "*_ X"], steering: Steering, num_experts: int
) -> Float[Tensor, "*_ X"]:
    """A router's logits as a steering changes them; entries after the first E stay."""
    own, rest = logits[..., :num_experts], logits[..., num_experts:]
    made = own
    if steering.logits is not None:
        made = made + steering.logits.to(made).view(_like(steering.logits, made))
    if steering.spread is not None:
        deviation = own.float().std(-1, keepdim=True, correction=0)
        made = made + (deviation * steering.spread.view(_like(steering.spread, made))).to(made)
    if steering.highest is not None:
        top = made.amax(-1, keepdim=True)
        above = top + top.abs().clamp(min=1) * 2 * torch.finfo(made.dtype).eps
        made = torch.where(steering.highest.view(_like(steering.highest, made)), above, made)
    if steering.mixture is not None and steering.share is not None:
        share = steering.share.to(torch.float32)[..., None]
        mixture = steering.mixture.to(torch.float32)
        share, mixture = (x.view(_like(x, made)) for x in (share, mixture))
        mixed = (1 - share) * made.float().softmax(-1) + share * mixture
        # Where nothing is mixed in, not even rounding is.
        made = torch.where(share > 0, mixed.log().to(made.dtype), made)
    return torch.cat([made, rest], dim=-1)


def _like(given: Tensor, logits: Tensor) -> tuple[int, ...]:
    """The shape of a row for all tokens, or of one row a token, against logits of whatever axes."""
    if given.ndim == 1:
        return (given.shape[-1],)
    return (*logits.shape[:-1], given.shape[-1])
