"""Expert prototyping: experts in groups, and the best one of each group for every token."""

from __future__ import annotations

from typing import final

from mixtura.errors import SettingError, check_range
from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_per_group
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 139,
    "title": "M6-T: Exploring Sparse Expert Models and Beyond",
    "tags": ["token_independent", "keeps_weights"],
    "gaps": {
        "check_logits_give_scores": "every prototype has a softmax of its own, before which the logits are",
    },
}


@final
class M6T(Router):
    """Cut the experts into ``num_prototypes`` groups and route each token to the best one of every group.

    k groups make k experts a token without choosing them one after another: each prototype is a top-1
    router of its own, with a softmax over its own experts, whose probability weighs the output; the outputs
    of all prototypes are summed. The loads of different prototypes do not compete. Of equal probabilities
    in a group the expert of lowest index is taken.

    Shapes:
        ``x [T, D]`` to ``T * num_prototypes`` assignments; one parameter, ``weight [E, D]``, in which each
        run of ``E / num_prototypes`` rows is one prototype's router.

    Raises:
        SettingError: ``num_prototypes`` is not in [1, E] or does not divide E.

    Example:
        >>> import torch
        >>> router = M6T(LayerShape(d_model=4, d_expert=8, num_experts=4), num_prototypes=2)
        >>> with torch.no_grad():
        ...     _ = router.weight.copy_(torch.eye(4))
        >>> router(RouterInput.of(torch.eye(4)[3:])).expert_ids.tolist()
        [0, 3]

    Differences from the paper:
        No limit on an expert's tokens: give the layer a ``Capacity`` for one. The reported scores are the
        prototypes' probabilities over their number, so that a token's scores sum to 1. Only the abstract
        was at hand.

    Reference:
        M6-T: Exploring Sparse Expert Models and Beyond (paper 139, abstract).
    """

    choice_settings = ("num_prototypes",)

    def __init__(self, shape: LayerShape, *, num_prototypes: int = 2, seed: int = 0) -> None:
        super().__init__(shape)
        check_range("M6T", "num_prototypes", num_prototypes, 1, shape.num_experts)
        if shape.num_experts % num_prototypes:
            raise SettingError(
                f"num_prototypes of M6T must divide the {shape.num_experts} experts, got {num_prototypes}"
            )
        self.num_prototypes = num_prototypes
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        size = self.shape.num_experts // self.num_prototypes
        scores = softmax(logits.reshape(-1, size)).reshape(logits.shape)
        chosen = best_per_group(scores, self.num_prototypes, 1)
        return self.chose(
            inputs, chosen, scores.gather(-1, chosen), scores=scores / self.num_prototypes, logits=logits
        )
