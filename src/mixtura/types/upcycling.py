"""Making a Mixture-of-Experts model of dense ones: what a method is told, and the actions it answers with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.types import Action

RouterInit = Literal["zeros", "normal", "rows"]
# Of attention, by which an action names them.
ATTENTION_PARTS: Final = ("query", "key", "value", "output")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DenseShape:
    """Sizes of a model, a dense one for most methods, as a method is told them that makes another of it.

    Attributes:
        d_model: D.
        d_ffn: F, the width of its feed-forward parts.
        num_layers: L, its decoder layers; all have such a part.
        num_heads: of its attention's queries; ``num_key_value_heads`` of keys and values.
        d_head: the width of a head.
        num_words: V, its vocabulary.
        num_experts: E, where it is an MoE model already, whose experts are F wide; ``top_k`` of them for a
            token. 0 in a dense one.
    """

    d_model: int
    d_ffn: int
    num_layers: int
    num_heads: int = 1
    num_key_value_heads: int = 1
    d_head: int = 1
    num_words: int = 1
    num_experts: int = 0
    top_k: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleShape:
    """What is to come out: E experts a layer, K of them for a token.

    Raises:
        SettingError: K is not in [1, E], or there are fewer than two experts.
    """

    num_experts: int
    top_k: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("upcycle", "--experts", self.num_experts, 2, 1 << 16)
        check_range("upcycle", "--top-k (at most the number of experts)", self.top_k, 1, self.num_experts)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """What was seen of one feed-forward part of a dense model. The letter G counts groups of text.

    Attributes:
        means: by group, the mean over sequences of each one's mean input; inputs are normed states, which
            are what a router in this place is given. Padding is not among them.
        lasts: by group, the mean over sequences of the input of each one's last token.
        products: XᵀX over all tokens, a column of ones beside the inputs. Only where it is asked for.
        targets: Xᵀ times which group a token is of; with ``products``.
        counts: tokens by group.
        activations: mean of the absolute inputs of the down projection, by neuron. Only where asked for.
        often: how often a neuron's absolute activation is among a token's ten largest, by neuron; with
            ``activations``.
        largest: by token, the ten neurons of largest absolute activation, where inputs and rows of gate and
            up are made of length one first. Only where asked for.
        domains: mean of the absolute inputs of the down projection, by domain of the text and by neuron; each
            group is one. Only where asked for.
    """

    means: Float[Tensor, "G D"]
    lasts: Float[Tensor, "G D"]
    counts: Int[Tensor, " G"]
    products: Float[Tensor, "D1 D1"] | None = None
    targets: Float[Tensor, "D1 G"] | None = None
    activations: Float[Tensor, " F"] | None = None
    often: Float[Tensor, " F"] | None = None
    largest: Int[Tensor, "T J"] | None = None
    domains: Float[Tensor, "M F"] | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTrace:
    """What one pass of text saw of a dense model.

    Attributes:
        layers: by decoder layer; empty where nothing ran.
        embeddings: by group, the mean embedding of all its tokens. Only where it is asked for.
        experts: by group, the number of the source (or expert) that its text is for; -1 for none.
        negative: by group, whether its text is what that expert is *not* for.
    """

    layers: tuple[LayerInputs, ...]
    embeddings: Float[Tensor, "G D"] | None = None
    experts: tuple[int, ...]
    negative: tuple[bool, ...]

    def rows(self, values: Float[Tensor, "G D"], num_experts: int) -> Float[Tensor, "E D"]:
        """A row an expert: what its groups have, less what the groups have that it is not for.

        Raises:
            UserError: an expert has no text.
        """
        made = []
        for expert in range(num_experts):
            plus, minus = self._of(expert, negative=False), self._of(expert, negative=True)
            if not plus:
                raise UserError(
                    f"there are no prompts for source {expert}; give --prompts a file with some for each"
                )
            row = values[plus].mean(0)
            made.append(row - values[minus].mean(0) if minus else row)
        return torch.stack(made)

    def _of(self, expert: int, *, negative: bool) -> list[int]:
        pairs = enumerate(zip(self.experts, self.negative, strict=True))
        return [place for place, (own, no) in pairs if own == expert and no == negative]


@final
@dataclass(frozen=True, slots=True)
class Become(Action):
    """The family of the result and what its config says besides; ``shared_width`` is 0 for none."""

    kind: ClassVar[str] = "become"

    family: str
    num_experts: int
    top_k: int
    d_expert: int
    shared_width: int
    settings: dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Carry(Action):
    """Every tensor outside the feed-forward parts: of one source as it is, of several their weighted sum."""

    kind: ClassVar[str] = "carry"

    sources: tuple[int, ...]
    weights: tuple[float, ...]


@final
@dataclass(frozen=True, slots=True)
class Build(Action):
    """One expert of a layer, of neurons of a source's feed-forward part.

    Attributes:
        layer: the decoder layer.
        expert: its number; None for the expert that every token visits, whose output is added as it is.
        source: number of the source.
        neurons: all (None), those from a first to before a last, or the name of an array of numbers.
        scale: what the down projection is multiplied with.
        redrawn: share of its neurons whose weights are drawn anew, from a normal distribution with mean and
            deviation of what they replace.
        seed: of the draw.
    """

    kind: ClassVar[str] = "build"

    layer: int
    expert: int | None
    source: int
    neurons: tuple[int, int] | str | None = None
    scale: float = 1.0
    redrawn: float = 0.0
    seed: int = 0


@final
@dataclass(frozen=True, slots=True)
class Approach(Action):
    """One expert of a layer: a base's feed-forward part and a change of low rank towards another source's.

    The change of each matrix is the best of that rank: the first ``rank`` terms of its singular value
    decomposition.
    """

    kind: ClassVar[str] = "approach"

    layer: int
    expert: int
    source: int
    base: int
    rank: int


@final
@dataclass(frozen=True, slots=True)
class SetRouter(Action):
    """The router of a layer: zeros, drawn from a normal distribution, or the rows of an array."""

    kind: ClassVar[str] = "set_router"

    layer: int
    init: RouterInit
    std: float = 0.0
    seed: int = 0
    rows: str | None = None


@final
@dataclass(frozen=True, slots=True)
class CarryAttention(Action):
    """Projections of attention in every layer, where the result has several experts of attention.

    Attributes:
        parts: which: `ATTENTION_PARTS`; norms of queries and keys go with these.
        expert: of which expert; None for what all experts have in common.
        sources: of which sources they are the sum, with ``weights``.
    """

    kind: ClassVar[str] = "carry_attention"

    parts: tuple[str, ...]
    expert: int | None
    sources: tuple[int, ...]
    weights: tuple[float, ...]


@final
@dataclass(frozen=True, slots=True)
class RouteAttention(Action):
    """The router of a layer's experts of attention, drawn from a normal distribution."""

    kind: ClassVar[str] = "route_attention"

    layer: int
    std: float
    seed: int = 0


@final
@dataclass(frozen=True, slots=True)
class Grow(Action):
    """A new decoder layer of a dense model, which computes nothing until it is trained.

    What attention and the feed-forward part write with is zero; norms are those of a layer that there is,
    and so are the other matrices, or with ``std`` above 0 they are drawn with that deviation.

    Attributes:
        after: the source's layer that it stands on; several on one are in the order of the actions.
        copy_of: the source's layer whose parts it has.
        std: of the matrices that are drawn; 0 for copies.
        seed: of the draw.
    """

    kind: ClassVar[str] = "grow"

    after: int
    copy_of: int
    std: float = 0.0
    seed: int = 0


@final
@dataclass(frozen=True, slots=True)
class Fill(Action):
    """A parameter of a layer's router, where the model is one of mixtura's own.

    Attributes:
        layer: the decoder layer; the first of those that share a router.
        name: the parameter's.
        values: the name of an array that it is; None where it is made of a matrix.
        matrix: of which matrix of the dense model; queries and keys are those of attention.
        source: number of the source.
        rows: the name of an array of numbers of rows; None for the first ones.
        heads: into how many heads the rows are cut; 0 for none.
        width: rows of a head.
        times: the name of an array ``[E, D]`` whose rows are multiplied by each head's, giving ``[E, width]``
            for a head.
        unit: whether rows are made of length one.
    """

    kind: ClassVar[str] = "fill"

    layer: int
    name: str
    values: str | None = None
    matrix: Literal["gate", "up", "query", "key"] | None = None
    source: int = 0
    rows: str | None = None
    heads: int = 0
    width: int = 0
    times: str | None = None
    unit: bool = False

    def made(self, matrix: Float[Tensor, "R D"] | None, arrays: Mapping[str, Tensor]) -> Tensor:
        """The parameter, of the whole of the matrix.

        Raises:
            UserError: the matrix has too few rows.
        """
        if matrix is None:
            return arrays[str(self.values)].float()
        chosen = matrix.float()
        if self.rows is not None:
            chosen = chosen[arrays[self.rows].long()]
        elif self.heads:
            chosen = chosen[: self.heads * self.width]
        if self.unit:
            chosen = chosen / chosen.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        if not self.heads:
            return chosen
        if chosen.shape[0] != self.heads * self.width:
            raise UserError(
                f"layer {self.layer} has {matrix.shape[0]} rows of the matrix {self.matrix}, and "
                f"{self.heads} heads of {self.width} are asked for"
            )
        cut = chosen.view(self.heads, self.width, -1)
        if self.times is None:
            return cut
        return torch.einsum("rwd,ed->rew", cut, arrays[self.times].float())


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """What a method answers: actions, and arrays that they name by their digest.

    ``own`` are fields of the config of a model of mixtura's own, ``moe`` and ``layers`` of
    `mixtura.modeling.config.MixturaConfig`, where a method makes what no ordinary family has; then the router
    is what they say, and what of it no action fills begins as in a new model. Where ``lessons`` is above 0,
    the router, which serves all layers, is taught in so many steps which experts' neurons a token activates.

    >>> rows = torch.eye(2)
    >>> recipe = Recipe.of([SetRouter(0, "rows", rows=array_name(rows))], [rows])
    >>> list(recipe.arrays) == [recipe.actions[0].rows]
    True
    """

    actions: tuple[Action, ...]
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    lessons: int = 0

    @staticmethod
    def of(
        actions: Sequence[Action],
        arrays: Sequence[Tensor] = (),
        own: Mapping[str, Any] | None = None,
        lessons: int = 0,
    ) -> Recipe:
        """Actions with their arrays."""
        return Recipe(tuple(actions), {array_name(one): one for one in arrays}, own or {}, lessons)


def array_name(values: Tensor) -> str:
    """The name that an action calls an array by: a digest of its type, shape and numbers."""
    kept = values.detach().contiguous()
    digest = hashlib.sha256(f"{kept.dtype} {tuple(kept.shape)}".encode())
    digest.update(kept.numpy().tobytes())
    return digest.hexdigest()[:32]
