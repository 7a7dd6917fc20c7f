"""The records of one MoE layer: what its router decided, and what a balancer reads of that.

Import them from `mixtura.types`, which also has the legend of shape letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import final

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from mixtura.errors import UserError
from mixtura.types.inputs import ExpertsHandle


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Which token goes to which expert with what weight, as N assignments sorted by expert.

    Build one with `Routing.from_choices` or `Routing.from_assignments`, which sort stably (tokens
    of one expert stay in order). ``scores`` and ``logits`` are dense, so that losses and analyses
    can read what was not chosen too.

    Attributes:
        token_ids, expert_ids, weights: the assignments.
        scores: what was compared to choose; probabilities where the method has them.
        logits: before scores were made of them.
        valid: False for padding.
        losses: what to add to the training loss, by name, already multiplied by its coefficient.
        state: for the router of the next MoE layer, one row a token.
        history: for this router when it routes later tokens of these sequences; first axis S.
        extra: added to the layer's output as it is: a branch of the method's own.
        modulation: by what tokens are multiplied, feature by feature, before experts read them; None for 1.
        demand: assignments per expert before a capacity limit dropped some; None without a limit.
        axes: where experts lie on a grid of R rows and C columns, expert ``i * C + j`` in row i and column
            j, the routing of the rows and that of the columns. ``scores`` and ``logits`` are then theirs,
            side by side, so that nothing of size ``[T, E]`` is made.
        gates: what H heads give to rows and to columns, ``[T, H, R]`` and ``[T, H, C]``, in place of
            assignments: expert ``i * C + j`` has the weight ``sum_h rows[t, h, i] * columns[t, h, j]``.
    """

    token_ids: Int[Tensor, " N"]
    expert_ids: Int[Tensor, " N"]
    weights: Float[Tensor, " N"]
    scores: Float[Tensor, "T E"]
    logits: Float[Tensor, "T E"]
    valid: Bool[Tensor, " T"]
    losses: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    state: Float[Tensor, "T *_"] | None = None
    history: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Float[Tensor, "T D"] | None = None
    modulation: Float[Tensor, "T D"] | None = None
    demand: Int[Tensor, " E"] | None = None
    axes: tuple[Routing, ...] = ()
    gates: tuple[Float[Tensor, "T H R"], Float[Tensor, "T H C"]] | None = None

    def __post_init__(self) -> None:
        rows = self.scores.shape[:1]
        if self.scores.dim() != 2 or self.logits.shape != self.scores.shape or self.valid.shape != rows:
            raise UserError(
                "scores and logits of Routing must both be [T, E] and valid [T], got "
                f"{tuple(self.scores.shape)}, {tuple(self.logits.shape)} and {tuple(self.valid.shape)}"
            )
        if self.valid.dtype != torch.bool:
            raise UserError(f"valid of Routing must be true or false, got {self.valid.dtype}")
        if not self.token_ids.shape == self.expert_ids.shape == self.weights.shape:
            raise UserError(
                "token_ids, expert_ids and weights of Routing must be one entry an assignment each, got "
                f"{[tuple(one.shape) for one in (self.token_ids, self.expert_ids, self.weights)]}"
            )

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.scores.shape[0]

    @property
    def num_experts(self) -> int:
        """E; the number of rows times that of columns where experts lie on a grid."""
        return prod(one.num_experts for one in self.axes) if self.axes else self.scores.shape[1]

    @property
    def places(self) -> tuple[Routing, ...]:
        """What balancers and meters see: this routing, or its axes', the first with this one's losses."""
        if not self.axes:
            return (self,)
        first, *others = self.axes
        return (replace(first, losses={**first.losses, **self.losses}), *others)

    @property
    def load(self) -> Int[Tensor, " E"]:
        """Assignments per expert."""
        return torch.bincount(self.expert_ids, minlength=self.num_experts)

    @property
    def offsets(self) -> Int[Tensor, " E"]:
        """End of each expert's run in the sorted assignments (inclusive prefix sums of ``load``)."""
        return self.load.cumsum(0)

    @property
    def rank(self) -> Int[Tensor, " N"]:
        """Place of each assignment in its expert's queue, from 0."""
        starts = self.offsets - self.load
        return torch.arange(self.expert_ids.shape[0], device=starts.device) - starts[self.expert_ids]

    @staticmethod
    def from_assignments(
        token_ids: Int[Tensor, " N"],
        expert_ids: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
        *,
        scores: Float[Tensor, "T E"],
        logits: Float[Tensor, "T E"],
        valid: Bool[Tensor, " T"],
        losses: Mapping[str, Float[Tensor, ""]] | None = None,
        state: Float[Tensor, "T *_"] | None = None,
        history: Mapping[str, Tensor] | None = None,
        extra: Float[Tensor, "T D"] | None = None,
    ) -> Routing:
        """Sort assignments by expert (stable); those of tokens that are not valid are left out."""
        kept = valid[token_ids].nonzero().squeeze(-1)
        order = kept[torch.sort(expert_ids[kept], stable=True).indices]
        return Routing(
            token_ids=token_ids[order],
            expert_ids=expert_ids[order],
            weights=weights[order],
            scores=scores,
            logits=logits,
            valid=valid,
            losses=losses or {},
            state=state,
            history=history or {},
            extra=extra,
        )

    @staticmethod
    def from_choices(
        expert_ids: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        *,
        scores: Float[Tensor, "T E"],
        logits: Float[Tensor, "T E"],
        valid: Bool[Tensor, " T"],
        losses: Mapping[str, Float[Tensor, ""]] | None = None,
        state: Float[Tensor, "T *_"] | None = None,
        history: Mapping[str, Tensor] | None = None,
        extra: Float[Tensor, "T D"] | None = None,
    ) -> Routing:
        """The routing in which every token chose K experts; an id of E or more is an absent choice."""
        num_tokens, num_chosen = expert_ids.shape
        token_ids = torch.arange(num_tokens, device=expert_ids.device).repeat_interleave(num_chosen)
        flat_ids, flat_weights = expert_ids.reshape(-1), weights.reshape(-1)
        present = ((flat_ids >= 0) & (flat_ids < scores.shape[1])).nonzero().squeeze(-1)
        return Routing.from_assignments(
            token_ids[present],
            flat_ids[present],
            flat_weights[present],
            scores=scores,
            logits=logits,
            valid=valid,
            losses=losses,
            state=state,
            history=history,
            extra=extra,
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BalancerInput:
    """What a balancer may read about one layer. A method reads only fields its tags declare.

    ``routing``, ``load`` and ``state`` are always there to be read.

    Attributes:
        routing: of the tokens at hand, perhaps a part of the batch.
        load: assignments asked for per expert in the whole batch, all micro-batches and processes
            together; None when the routing at hand is the whole.
        loads: the same for every MoE layer of the model.
        num_tokens: valid tokens of the whole batch; None when the routing at hand is the whole.
        state: what `Balancer.start` or the last `Balancer.update` returned.
        step: optimizer steps done so far.
        generator: of all randomness; without one there is none.
        sequence_ids: the sequence of each token, from 0.
        experts: the layer's experts.
        router_weight: the router's row of each expert.
        gradients: at the step before, the gradient of each expert's matrices that read a token, flattened;
            None at the first step.

    Raises:
        UserError: a field does not have one row for each token, or one for each expert.
    """

    routing: Routing
    load: Num[Tensor, " E"] | None = None
    loads: Num[Tensor, "L E"] | None = None
    num_tokens: int | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0
    generator: torch.Generator | None = None
    sequence_ids: Int[Tensor, " T"] | None = None
    experts: ExpertsHandle | None = None
    router_weight: Float[Tensor, "E D"] | None = None
    gradients: Float[Tensor, "E P"] | None = None

    def __post_init__(self) -> None:
        num_tokens, num_experts = self.routing.scores.shape
        for name, length, what in (("load", num_experts, "expert"), ("sequence_ids", num_tokens, "token")):
            values = getattr(self, name)
            if values is not None and tuple(values.shape) != (length,):
                _refuse_shape(name, f"one entry for each of {length} {what}s", values.shape)
        if self.loads is not None and tuple(self.loads.shape[1:]) != (num_experts,):
            _refuse_shape("loads", f"a row of {num_experts} experts for each layer", self.loads.shape)
        if self.gradients is not None and (
            self.gradients.dim() != 2 or self.gradients.shape[0] != num_experts
        ):
            _refuse_shape("gradients", f"one row for each of {num_experts} experts", self.gradients.shape)
        if self.experts is not None and self.router_weight is not None:
            held = self.experts.shape
            wanted = (held.num_experts, held.d_model)
            if tuple(self.router_weight.shape) != wanted:
                what = f"one row of {wanted[1]} features for each of {wanted[0]} experts"
                _refuse_shape("router_weight", what, self.router_weight.shape)

    @property
    def demand(self) -> Num[Tensor, " E"]:
        """The assignments per expert to balance: ``load`` if given, else what the tokens asked for.

        What a capacity limit dropped is counted: an expert that is too popular must feel it.
        """
        if self.load is not None:
            return self.load
        return self.routing.load if self.routing.demand is None else self.routing.demand


def _refuse_shape(name: str, wanted: str, got: torch.Size) -> None:
    raise UserError(f"{name} of BalancerInput must have {wanted}, got a shape of {tuple(got)}")
