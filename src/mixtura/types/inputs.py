"""What a router works with: the sizes of its layer, the tokens and what it asks for besides, the experts.

Import the records from `mixtura.types`, which also has the legend of shape letters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixtura.errors import UserError


@final
@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of one MoE layer, read from its tensors."""

    d_model: int
    d_expert: int
    num_experts: int

    def split(self, granularity: int) -> LayerShape:
        """The shape with each expert cut into ``granularity`` narrower ones: fine-grained experts.

        >>> LayerShape(d_model=8, d_expert=16, num_experts=4).split(2)
        LayerShape(d_model=8, d_expert=8, num_experts=8)

        Raises:
            UserError: the expert width cannot be divided so.
        """
        if granularity < 1 or self.d_expert % granularity:
            raise UserError(
                f"experts of width {self.d_expert} cannot be cut into {granularity} equal parts; "
                "choose a granularity that divides the width"
            )
        return LayerShape(self.d_model, self.d_expert // granularity, self.num_experts * granularity)


@runtime_checkable
class ExpertsHandle(Protocol):
    """A layer's experts as routers, mixers and balancers may use them: run some, read or merge them.

    The experts may be those of this layer or a pool that several layers share. Everything is
    differentiable once, in the tokens and in the experts' matrices.
    """

    @property
    def shape(self) -> LayerShape:
        """Sizes; ``num_experts`` counts all that can be reached from this layer."""

    @property
    def gate(self) -> Float[Tensor, "E F D"] | None:
        """The matrices whose product goes through the activation; `None` where experts have none."""

    @property
    def up(self) -> Float[Tensor, "E F D"]:
        """The matrices that read a token."""

    @property
    def down(self) -> Float[Tensor, "E D F"]:
        """The matrices that write the output."""

    def run(
        self, x: Float[Tensor, "T D"], token_ids: Int[Tensor, " N"], expert_ids: Int[Tensor, " N"]
    ) -> Float[Tensor, "N D"]:
        """Outputs, not weighted: row i is expert ``expert_ids[i]`` of the row ``token_ids[i]`` of ``x``."""

    def merged(self, mix: Float[Tensor, "G E"]) -> ExpertsHandle:
        """G experts whose every matrix is a weighted sum of those of these experts."""

    def mixed(self, up_mix: Float[Tensor, "R E"], down_mix: Float[Tensor, "D E"]) -> ExpertsHandle:
        """One expert of which every row of every matrix is a sum with weights of its own."""

    def narrowed(self, d_expert: int) -> ExpertsHandle:
        """These experts with their first ``d_expert`` hidden features alone."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RouterInput:
    """What a router or mixer may read when it decides. A method reads only fields its tags declare.

    ``x`` and ``valid`` are always there. Of the others, those that are not asked for are at their
    default; a method that cannot do without one asks for it by `need` or `label`.

    Attributes:
        x: the tokens of all sequences, one after another or mixed.
        valid: False for padding.
        layer: which of the model's MoE layers this is, from 0.
        turn: which of the layer's passes this is, from 0; layers without a form have one.
        step: optimizer steps done so far; what schedules and phases go by.
        training: whether the result will be trained on.
        causal: whether tokens must not depend on later ones (a decoder). An encoder says False.
        decoding: whether a sequence's earlier tokens were routed in earlier calls.
        generator: of all randomness; without one there is none.
        sequence_ids: the sequence of each token, from 0; its highest value is S - 1.
        positions: each token's place in its sequence, from 0.
        token_ids: vocabulary entries.
        labels: what is known of each token by name, such as ``domain``, ``language`` or ``modality``:
            integers ``[T]``, negative where unknown.
        attention: what each token gives to the tokens of its own sequence by their position, averaged
            over heads. Rows of tokens sum to 1; later positions hold 0.
        state: what the router of the MoE layer before returned as state; None in the first.
        history: what this router returned as history when the earlier tokens of these sequences were
            routed: tensors whose first axis is S.
        selection_bias: added to scores when choosing, never to weights.
        allowed: the experts a token may go to.
        experts: the layer's experts, to run or to read.

    Raises:
        UserError: a field does not have one row for each token, or is not of its kind of numbers.
    """

    x: Float[Tensor, "T D"]
    valid: Bool[Tensor, " T"]
    layer: int = 0
    turn: int = 0
    step: int = 0
    training: bool = False
    causal: bool = True
    decoding: bool = False
    generator: torch.Generator | None = None
    sequence_ids: Int[Tensor, " T"] | None = None
    positions: Int[Tensor, " T"] | None = None
    token_ids: Int[Tensor, " T"] | None = None
    labels: Mapping[str, Int[Tensor, " T"]] = field(default_factory=dict)
    attention: Float[Tensor, "T C"] | None = None
    state: Float[Tensor, "T *_"] | None = None
    history: Mapping[str, Tensor] = field(default_factory=dict)
    selection_bias: Float[Tensor, " E"] | None = None
    allowed: Bool[Tensor, "T E"] | None = None
    experts: ExpertsHandle | None = None

    def __post_init__(self) -> None:
        if self.x.dim() != 2:
            raise UserError(f"x of RouterInput must be [T, D], got a shape of {tuple(self.x.shape)}")
        _check_field("valid", self.valid, self.x.shape[:1], "bool")
        for name in ("sequence_ids", "positions", "token_ids"):
            _check_field(name, getattr(self, name), self.x.shape[:1], "int")
        for name, values in self.labels.items():
            _check_field(f"labels[{name!r}]", values, self.x.shape[:1], "int")
        for name in ("attention", "allowed", "state"):
            _check_field(name, getattr(self, name), self.x.shape[:1], "bool" if name == "allowed" else "")

    def require_fit(self, shape: LayerShape, owner: str) -> None:
        """Raise unless sizes of tokens and experts are those that ``owner`` is made for.

        Raises:
            UserError: a size is another; the message names it.
        """
        _check_size(owner, "tokens of {} features", self.x.shape[-1], shape.d_model)
        for name, values in (("selection_bias", self.selection_bias), ("allowed", self.allowed)):
            if values is not None:
                _check_size(owner, f"{{}} experts in {name}", values.shape[-1], shape.num_experts)
        if self.experts is not None:
            _check_size(owner, "{} experts", self.experts.shape.num_experts, shape.num_experts)

    @staticmethod
    def of(x: Float[Tensor, "T D"], **fields: Any) -> RouterInput:
        """An input in which every token counts; other fields by name."""
        fields.setdefault("valid", torch.ones(x.shape[0], dtype=torch.bool, device=x.device))
        return RouterInput(x=x, **fields)

    @property
    def may_look_ahead(self) -> bool:
        """Whether all of a sequence's tokens may decide about each: in training, and always in an encoder.

        At inference in a decoder how many tokens come, and which, is not known when a token is routed.
        """
        return self.training or not self.causal

    def need(self, name: str, owner: str) -> Any:
        """The field ``name``, which ``owner`` cannot do without.

        Raises:
            UserError: it was not given.
        """
        value = getattr(self, name)
        if value is None:
            raise UserError(f"{owner} cannot route without {name}; give RouterInput its {name}")
        return value

    def label(self, name: str, owner: str) -> Int[Tensor, " T"]:
        """The labels ``name`` of the tokens, which ``owner`` cannot do without.

        Raises:
            UserError: they were not given.
        """
        if name not in self.labels:
            given = ", ".join(sorted(self.labels)) or "none"
            raise UserError(
                f"{owner} cannot route without labels named {name!r}, got {given}; "
                f"give RouterInput labels={{{name!r}: ...}}, one integer a token"
            )
        return self.labels[name]

    @property
    def sequences(self) -> Int[Tensor, " T"]:
        """The sequence of each token; all are of sequence 0 where no ids were given."""
        if self.sequence_ids is not None:
            return self.sequence_ids
        return torch.zeros(self.x.shape[0], dtype=torch.long, device=self.x.device)


def _check_field(name: str, values: Tensor | None, rows: Sequence[int], kind: str) -> None:
    """Raise `UserError` unless a field of `RouterInput` has one row a token and is of its kind of numbers."""
    if values is None:
        return
    flat = kind == "int" or name == "valid"
    if tuple(values.shape if flat else values.shape[:1]) != tuple(rows):
        raise UserError(
            f"{name} of RouterInput must have one {'entry' if flat else 'row'} for each of {rows[0]} tokens, "
            f"got a shape of {tuple(values.shape)}"
        )
    whole = not (values.is_floating_point() or values.is_complex())
    if (kind == "bool" and values.dtype != torch.bool) or (kind == "int" and not whole):
        wanted = "true or false" if kind == "bool" else "whole numbers"
        raise UserError(f"{name} of RouterInput must be {wanted}, got {values.dtype}")


def _check_size(owner: str, what: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise UserError(
            f"{owner} is made for {what.format(wanted)}, got {got}; give it the ones of its own layer"
        )
