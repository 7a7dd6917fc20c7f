"""Growing Transformers: a dense model made deeper, with new layers that begin as nothing and learn alone."""

from __future__ import annotations

from typing import Literal, final

from mixtura.errors import UnknownNameError, check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.types import Action
from mixtura.types.upcycling import Carry, DenseShape, DenseTrace, Grow, Recipe, UpcycleShape

METHOD = {
    "paper": 187,
    "title": "Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate",
    "tags": ["grows", "initial:dense"],
}


@final
class GrowingTransformers(Upcycler):
    """Add layers to a trained dense model, to be trained while embeddings and old layers are frozen.

    A new layer adds nothing at first, since what it writes with is zero: the deeper model computes what the
    model did, to the bit. Then the new layers alone are trained (`mixtura tune --set layers=[...]`, whose
    numbers the command prints), and the next is added on top: depth grows a layer at a time on a substrate
    that stays. Models that grew on the same embeddings are joined by the decoder `logit_averaging`. What
    comes out is an ordinary dense model of the same family; there are no experts, so ``--experts`` and
    ``--top-k`` say nothing.

    A small model of which the new layer alone was trained for a short while ended 0.18 nats a token above one
    trained whole (two seeds, docs/arena/upcyclers.md): what is frozen learns nothing.

    Args:
        layers: how many are added.
        place: on top of all, or spread evenly.
        start: whether what a new layer reads with is that of the layer beneath, or drawn.
        std: of what is drawn.

    Shapes:
        A source of L layers to one of ``L + layers``.

    Raises:
        SettingError: ``layers`` is not in [1, 4096] or ``std`` not in [1e-6, 10].
        UnknownNameError: there is no such ``place`` or ``start``.

    Example:
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=4)
        >>> recipe = GrowingTransformers(layers=2, place="spread").recipe(
        ...     (dense,), UpcycleShape(num_experts=2, top_k=1), None
        ... )
        >>> [action.after for action in recipe.actions[1:]]
        [1, 3]

    Differences from the paper:
        Only the abstract was at hand. Embeddings there are drawn from pictures of Unicode characters and
        never trained; here they are the model's own, and whether they are frozen is up to the training.
        That new layers begin as nothing is ours: the abstract does not say how they begin. Its last stage,
        training all layers by LoRA, is `mixtura tune --adapter lora`.

    Reference:
        Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate (paper 187,
        abstract).
    """

    def __init__(
        self,
        *,
        layers: int = 1,
        place: Literal["top", "spread"] = "top",
        start: Literal["copied", "drawn"] = "copied",
        std: float = 0.02,
    ) -> None:
        check_range("GrowingTransformers", "layers", layers, 1, 4096)
        check_range("GrowingTransformers", "std", std, 1e-6, 10)
        if place not in ("top", "spread"):
            raise UnknownNameError("place of GrowingTransformers", place, ("top", "spread"))
        if start not in ("copied", "drawn"):
            raise UnknownNameError("start of GrowingTransformers", start, ("copied", "drawn"))
        self.layers, self.place, self.start, self.std = layers, place, start, std

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        del trace
        depth, actions = sources[0].num_layers, list[Action]([Carry((0,), (1.0,))])
        for number in range(self.layers):
            below = depth - 1 if self.place == "top" else max(1, (number + 1) * depth // self.layers) - 1
            std = self.std if self.start == "drawn" else 0.0
            actions.append(Grow(below, below, std, shape.seed * 4099 + number))
        return Recipe.of(actions)
