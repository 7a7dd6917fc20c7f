"""The experts of a layer as its core runs them: matrices, a bank of them, pools of banks, shared experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.kernels import routed_experts
from mixtura.kernels.records import ExpertExchange
from mixtura.methods import declared_tags
from mixtura.methods._activations import swiglu
from mixtura.methods._drawing import normal
from mixtura.methods._precision import exact
from mixtura.methods.experts import Bank, materialises, runs
from mixtura.methods.experts.ffn import Ffn
from mixtura.types import LayerShape, Matrices, RouterInput, Routing, Rows

# Experts up to which the weights that gates give to a grid are written out expert by expert.
_MOST_WRITTEN_OUT = 4096


@final
@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """Experts made of plain tensors: an `ExpertsHandle`, and what every bank of matrices is computed with.

    Expert e computes ``down[e] @ activation(gate_up[e] @ x)``. With the default activation the upper
    half of ``gate_up [E, 2F, D]`` is the gate; with another, ``gated`` says whether there is one. Biases and
    ``prepare`` are those of `mixtura.types.Matrices`.
    """

    gate_up: Float[Tensor, "E R D"]
    down: Float[Tensor, "E D F"]
    activation: Callable[[Tensor], Tensor] = swiglu
    gated: bool = True
    up_bias: Float[Tensor, "E R"] | None = None
    down_bias: Float[Tensor, "E D"] | None = None
    prepare: Callable[[Tensor], Tensor] | None = None

    @staticmethod
    def of(found: Matrices) -> ExpertMatrices:
        """A bank's matrices, to run them."""
        return ExpertMatrices(**{item.name: getattr(found, item.name) for item in fields(found)})

    @property
    def shape(self) -> LayerShape:
        """Sizes, read from the tensors."""
        num_experts, d_model, d_expert = self.down.shape
        return LayerShape(d_model=d_model, d_expert=d_expert, num_experts=num_experts)

    @property
    def gate(self) -> Float[Tensor, "E F D"] | None:
        """A view of the gate matrices."""
        return self.gate_up[:, : self.down.shape[2]] if self.gated else None

    @property
    def up(self) -> Float[Tensor, "E F D"]:
        """A view of the up matrices."""
        return self.gate_up[:, -self.down.shape[2] :]

    def run(
        self, x: Float[Tensor, "T D"], token_ids: Int[Tensor, " N"], expert_ids: Int[Tensor, " N"]
    ) -> Float[Tensor, "N D"]:
        """Row i is expert ``expert_ids[i]`` of ``x[token_ids[i]]``, not weighted."""
        rows = torch.arange(token_ids.shape[0], device=x.device)
        ones = torch.ones_like(rows, dtype=x.dtype)
        return self.weighted(x[token_ids], rows, expert_ids, ones)

    def weighted(
        self,
        x: Float[Tensor, "T D"],
        token_ids: Int[Tensor, " N"],
        expert_ids: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
    ) -> Float[Tensor, "T D"]:
        """Each token's weighted sum of its experts' outputs; zero for a token without an expert."""
        return routed_experts(
            x if self.prepare is None else self.prepare(x),
            token_ids,
            expert_ids,
            weights,
            self.gate_up,
            self.down,
            activation=self.activation,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
        )

    def merged(self, mix: Float[Tensor, "G E"]) -> ExpertMatrices:
        """G experts, each the sum of these weighted by a row of ``mix``."""

        def mixed(held: Tensor | None) -> Tensor | None:
            return None if held is None else torch.einsum("ge,e...->g...", mix.to(held.dtype), held)

        gate_up, down = mixed(self.gate_up), mixed(self.down)
        assert gate_up is not None
        assert down is not None
        up_bias, down_bias = mixed(self.up_bias), mixed(self.down_bias)
        return replace(self, gate_up=gate_up, down=down, up_bias=up_bias, down_bias=down_bias)

    def mixed(self, up_mix: Float[Tensor, "R E"], down_mix: Float[Tensor, "D E"]) -> ExpertMatrices:
        """One expert of which every row of every matrix is a sum with weights of its own."""

        def of_rows(mix: Tensor, held: Tensor | None) -> Tensor | None:
            return None if held is None else torch.einsum("re,er...->r...", mix.to(held.dtype), held)[None]

        gate_up, down = of_rows(up_mix, self.gate_up), of_rows(down_mix, self.down)
        assert gate_up is not None
        assert down is not None
        up_bias, down_bias = of_rows(up_mix, self.up_bias), of_rows(down_mix, self.down_bias)
        return replace(self, gate_up=gate_up, down=down, up_bias=up_bias, down_bias=down_bias)

    def narrowed(self, d_expert: int) -> ExpertMatrices:
        """These experts with their first ``d_expert`` hidden features alone."""
        if d_expert == self.shape.d_expert:
            return self

        def first(held: Tensor | None) -> Tensor | None:
            if held is None:
                return None
            halves = held.chunk(2, dim=1) if self.gated else (held,)
            return torch.cat([half[:, :d_expert] for half in halves], dim=1)

        gate_up = first(self.gate_up)
        assert gate_up is not None
        return replace(self, gate_up=gate_up, down=self.down[..., :d_expert], up_bias=first(self.up_bias))


@final
class Experts(nn.Module):
    """A bank of experts in a layer: weighs and adds up what each makes of its tokens.

    Args:
        bank: a method of the kind experts; a shape stands for plain gated experts (`ffn`) of these sizes.
        seed: of the plain experts.

    >>> Experts(LayerShape(d_model=8, d_expert=16, num_experts=4)).matrices.up.shape
    torch.Size([4, 16, 8])
    """

    def __init__(self, bank: Bank | LayerShape, *, seed: int = 0) -> None:
        super().__init__()
        self.bank = Ffn(bank, seed=seed) if isinstance(bank, LayerShape) else bank
        self.shape = self.bank.shape
        self.tags = declared_tags(type(self.bank))
        # Brings tokens to experts that lie on several processes, where that is so.
        self.mixtura_exchange: ExpertExchange | None = None

    @property
    def gate_up_proj(self) -> nn.Parameter:
        """Each expert's own matrices that read a token, where it has them."""
        return self.bank.get_parameter("gate_up_proj")

    @property
    def down_proj(self) -> nn.Parameter:
        """Each expert's own matrices that write the output, where it has them."""
        return self.bank.get_parameter("down_proj")

    @property
    def has_matrices(self) -> bool:
        """Whether the experts are matrices."""
        return materialises(type(self.bank))

    @property
    def matrices(self) -> ExpertMatrices:
        """The experts as tensors, to run, read or merge.

        Raises:
            UserError: the experts are no matrices.
        """
        if not self.has_matrices:
            raise UserError(
                f"{type(self.bank).__name__} has no matrices that could be read or merged; choose experts "
                "with the tag materialises, such as ffn"
            )
        return ExpertMatrices.of(self.bank.matrices())

    def forward(
        self, x: Float[Tensor, "T D"], routing: Routing, inputs: RouterInput | None = None
    ) -> Float[Tensor, "T D"]:
        """Each token's weighted sum of its experts' outputs; zero for a token without an expert."""
        return self.computed(x, routing, inputs)[0]

    def computed(
        self,
        x: Float[Tensor, "T D"],
        routing: Routing,
        inputs: RouterInput | None = None,
        matrices: ExpertMatrices | None = None,
    ) -> tuple[Float[Tensor, "T D"], Mapping[str, Tensor]]:
        """That sum, and what the experts remember; ``matrices`` are theirs where they were made before.

        Raises:
            UserError: the router gives gates to more experts than can be written out one by one.
        """
        if routing.gates is not None and "gates" in self.tags:
            output = self.bank.run_gates(x, *routing.gates)
            return torch.where(routing.valid[:, None], output, 0.0), {}
        if routing.gates is not None:
            routing = written_out(routing, type(self.bank).__name__)
        if self.mixtura_exchange is not None:
            routed = routing.token_ids, routing.expert_ids, routing.weights
            return self.mixtura_exchange(x, *routed), {}
        if not runs(type(self.bank)):
            known = self.matrices if matrices is None else matrices
            return known.weighted(x, routing.token_ids, routing.expert_ids, routing.weights), {}
        told = inputs or RouterInput.of(x, sequence_ids=None)
        rows = Rows.of(x, routing.token_ids, routing.expert_ids, self.shape.num_experts, told)
        ran = self.bank.run(rows)
        weighted = exact(ran.outputs) * exact(routing.weights)[:, None]
        summed = weighted.new_zeros(x.shape).index_add(0, routing.token_ids, weighted)
        return summed.to(x.dtype), ran.history


@final
class ExpertPool(nn.Module):
    """The experts of several layers as those of one: what a router may reuse from its neighbours.

    The experts of ``members[0]`` come first, and so on. The members are shared with the layers they
    belong to: the same modules, not copies.

    Raises:
        UserError: the members are of different widths, or their experts are no matrices.

    >>> shape = LayerShape(d_model=8, d_expert=16, num_experts=4)
    >>> ExpertPool([Experts(shape, seed=0), Experts(shape, seed=1)]).shape.num_experts
    8
    """

    def __init__(self, members: Sequence[Experts]) -> None:
        super().__init__()
        widths = {(member.shape.d_model, member.shape.d_expert) for member in members}
        if len(widths) != 1:
            raise UserError(
                "experts of one pool must all have the same widths, "
                f"got {sorted(widths)} as (d_model, d_expert)"
            )
        kinds = sorted({type(member.bank).__name__ for member in members})
        if len(kinds) != 1 or not members[0].has_matrices or runs(type(members[0].bank)):
            raise UserError(
                f"experts of one pool must be matrices of one kind, got {', '.join(kinds)}; choose experts "
                "such as ffn, or no pool"
            )
        self.members = nn.ModuleList(members)
        first = members[0].shape
        total = sum(member.shape.num_experts for member in members)
        self.shape = LayerShape(first.d_model, first.d_expert, total)
        self.tags = members[0].tags

    @property
    def banks(self) -> tuple[Experts, ...]:
        """The members in order."""
        return tuple(member for member in self.members if isinstance(member, Experts))

    @property
    def has_matrices(self) -> bool:
        """Whether the experts are matrices, which those of a pool always are."""
        return True

    @property
    def matrices(self) -> ExpertMatrices:
        """All members' experts as tensors."""
        parts = [member.matrices for member in self.banks]

        def joined(name: str) -> Tensor | None:
            held = [getattr(part, name) for part in parts]
            return None if held[0] is None else torch.cat(held)

        return replace(
            parts[0],
            gate_up=torch.cat([part.gate_up for part in parts]),
            down=torch.cat([part.down for part in parts]),
            up_bias=joined("up_bias"),
            down_bias=joined("down_bias"),
        )

    def computed(
        self,
        x: Float[Tensor, "T D"],
        routing: Routing,
        inputs: RouterInput | None = None,
        matrices: ExpertMatrices | None = None,
    ) -> tuple[Float[Tensor, "T D"], Mapping[str, Tensor]]:
        """Each token's weighted sum of its experts' outputs; these experts remember nothing."""
        del inputs, matrices
        return self(x, routing), {}

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Each token's weighted sum of its experts' outputs; only chosen experts are computed."""
        if routing.gates is not None:
            routing = written_out(routing, type(self.banks[0].bank).__name__)
        output = torch.zeros_like(x)
        start = 0
        for member in self.banks:
            local = routing.expert_ids - start
            start += member.shape.num_experts
            # Ids of other members lie outside this one's and are absent to it.
            output = output + member.matrices.weighted(x, routing.token_ids, local, routing.weights)
        return output


@final
class SharedExpert(nn.Module):
    """An expert that every token visits, beside those it is routed to.

    With ``gated`` its output is multiplied by a sigmoid of the token's product with a vector. With ``frozen``
    its matrices get no gradient, whatever a training asks of parameters.
    """

    def __init__(
        self, d_model: int, d_expert: int, *, gated: bool = False, frozen: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.seed, self.frozen = seed, frozen
        self.experts = Experts(LayerShape(d_model, d_expert, 1), seed=seed).requires_grad_(not frozen)
        drawn = normal(torch.Generator().manual_seed(seed + 1), 1, 1, d_model)
        self.gate = nn.Parameter(drawn / d_model**0.5) if gated else None

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The expert's output for every token."""
        own = self.experts.matrices
        matrices = (own.gate_up[0], own.down[0])
        gate_up, down = (one.detach() for one in matrices) if self.frozen else matrices
        output = F.linear(swiglu(F.linear(x, gate_up)), down)
        return output if self.gate is None else torch.sigmoid(F.linear(x, self.gate[0])) * output


def written_out(routing: Routing, owner: str) -> Routing:
    """The routing with an assignment for every expert of a grid that gates give a weight to.

    Raises:
        UserError: there are more than can be written out one by one.
    """
    assert routing.gates is not None
    if routing.num_experts > _MOST_WRITTEN_OUT:
        raise UserError(
            f"{owner} computes expert by expert, and {routing.num_experts} experts have gates; choose "
            "experts with the tag gates, such as product, or another router"
        )
    rows, columns = routing.gates
    dense = torch.einsum("thr,thc->trc", rows, columns).flatten(1)
    expert_ids, token_ids = ((dense != 0) & routing.valid[:, None]).T.nonzero(as_tuple=True)
    weights = dense[token_ids, expert_ids]
    return replace(routing, token_ids=token_ids, expert_ids=expert_ids, weights=weights, gates=None)
