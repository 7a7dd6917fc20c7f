"""Expert choice: experts pick their tokens, all equally many."""

from __future__ import annotations

from typing import Literal, final

import torch

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed, half_up, rank_in_sequence
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 94,
    "title": "Mixture-of-Experts with Expert Choice Routing",
    "tags": [
        "looks_ahead",
        "causal_inference",
        "keeps_weights",
        "reads:sequence_ids",
        "reads:training",
        "reads:causal",
    ],
}


@final
class ExpertChoice(Router):
    """Let every expert take its best tokens: ``capacity_factor * tokens / experts`` of them, rounded up.

    Scores are a softmax over experts; each expert takes the tokens that score it highest, within each
    sequence (``group="sequence"``) or within the whole batch (``"batch"``), so all experts are equally
    busy by construction and a token may have any number of them. Of equal scores the earlier token is
    taken. An expert's output is weighted by its score.

    Choosing among a sequence's tokens needs all of them. At inference in a decoder each token therefore
    takes its ``capacity_factor`` best experts itself, the factor rounded to the nearest whole number, a half
    up; with a whole factor that costs the same on average.

    Shapes:
        ``x [T, D]`` to about ``capacity_factor * T`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``capacity_factor`` is not in [1, E].

    Example:
        >>> router = ExpertChoice(LayerShape(d_model=4, d_expert=8, num_experts=2), capacity_factor=1.0)
        >>> router(RouterInput.of(torch.eye(4), training=True)).load.tolist()
        [2, 2]

    Differences from the paper:
        The paper chooses within the batch, which lets sequences influence each other; choosing within
        each sequence is the default here. The paper gives no rule for decoding; the one above is ours.

    Reference:
        Mixture-of-Experts with Expert Choice Routing (paper 94, abstract).
    """

    choice_settings = ("capacity_factor",)

    def __init__(
        self,
        shape: LayerShape,
        *,
        capacity_factor: float = 2.0,
        group: Literal["sequence", "batch"] = "sequence",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.capacity_factor = self.within("capacity_factor", capacity_factor, 1, shape.num_experts)
        self.group = group
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        if not inputs.may_look_ahead:
            chosen, weights = best_weighed(scores, half_up(self.capacity_factor), renormalize=False)
            return self.chose(inputs, chosen, weights, scores=scores, logits=logits)
        groups = inputs.sequences if self.group == "sequence" else torch.zeros_like(inputs.sequences)
        sizes = torch.bincount(groups[inputs.valid], minlength=int(groups.max()) + 1 if groups.numel() else 0)
        room = torch.ceil(self.capacity_factor * sizes / self.shape.num_experts)
        taken = rank_in_sequence(scores, inputs.valid, groups) < room[groups][:, None]
        token_ids, expert_ids = taken.nonzero(as_tuple=True)
        return Routing.from_assignments(
            token_ids,
            expert_ids,
            scores[token_ids, expert_ids].to(inputs.x.dtype),
            scores=scores,
            logits=logits,
            valid=inputs.valid,
        )
