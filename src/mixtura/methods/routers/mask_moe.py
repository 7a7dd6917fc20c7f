"""MaskMoE: each vocabulary entry sees its own few experts, a rare one only one."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Num
from torch import Tensor

from mixtura.methods._drawing import generator_of, router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import masked, softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, check_counts, present
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 117,
    "title": "MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts",
    "tags": ["expert_rows", "token_independent", "reads:token_ids"],
    "gaps": {
        "check_logits_give_scores": "the logits are those before experts are masked",
    },
}


@final
class MaskMoe(Router):
    """Route within a mask of experts fixed for each vocabulary entry: one for rare words, more for others.

    Frequent entries see ``num_visible`` experts drawn by ``seed``, rare ones the first of theirs alone, so
    that all occurrences of a rare word train one expert while frequent words keep varied representations.
    The softmax and the choice of the ``num_choices`` most probable go over the visible experts only; their
    probabilities are the weights, which is 1 for a rare entry. Of equal ones the lowest index is taken.
    Frequent are the most used entries that together make ``frequent_share`` of a text: `refit` takes the
    counts of one; before, entries are taken to follow Zipf's law in the order of their ids.

    Shapes:
        ``x [T, D]`` and ``token_ids [T]`` to at most ``T * num_choices`` assignments; one parameter,
        ``weight [E, D]``, and the buffer ``visible [V, E]``. Ids of ``num_words`` or more start again at 0.

    Raises:
        SettingError: ``num_visible`` is not in [1, E], ``num_choices`` not in [1, num_visible],
            ``frequent_share`` not in [0, 1], or ``num_words`` not in [1, 1e8].
        UserError: token ids are not given.

    Example:
        >>> router = MaskMoe(LayerShape(d_model=2, d_expert=8, num_experts=4), num_words=3, num_visible=2)
        >>> router.refit(torch.tensor([1, 8, 1]))
        >>> router.visible.sum(-1).tolist()
        [1, 2, 1]

    Differences from the paper:
        Where frequent words end, how many experts they see and Zipf's law before `refit` are settings and
        guesses of ours: only the abstract and a summary were at hand. Give each layer its own ``seed``, or
        all layers have the same masks.

    Reference:
        MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts (paper 117, abstract).
    """

    visible: Bool[Tensor, "V E"]

    def __init__(
        self,
        shape: LayerShape,
        *,
        num_visible: int = 2,
        num_choices: int = 1,
        frequent_share: float = 0.6,
        num_words: int = 32768,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.num_visible = self.within("num_visible", num_visible, 1, shape.num_experts)
        self.num_choices = self.within("num_choices", num_choices, 1, num_visible)
        self.frequent_share = self.within("frequent_share", frequent_share, 0, 1)
        self.num_words = self.within("num_words", num_words, 1, 1e8)
        self.seed = seed
        self.weight = router_weight(shape, seed)
        self.register_buffer("visible", torch.zeros(num_words, shape.num_experts, dtype=torch.bool))
        self.refit(1 / torch.arange(1, num_words + 1, dtype=torch.float64))

    def forward(self, inputs: RouterInput) -> Routing:
        words = inputs.need("token_ids", "MaskMoe")
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(masked(logits, self.visible[words % self.num_words]))
        wanted = masked(scores, scores > 0)
        chosen = best(wanted, self.num_choices)
        return self.chose(
            inputs, present(chosen, wanted), scores.gather(-1, chosen), scores=scores, logits=logits
        )

    @torch.no_grad()
    def refit(self, counts: Num[Tensor, " V"]) -> None:
        """Take as frequent the entries most used in a text with these word counts; masks stay as drawn.

        Raises:
            UserError: there is not one count, finite and not negative, for each of ``num_words`` entries.
        """
        check_counts("MaskMoe", counts, self.num_words)
        order = torch.sort(counts, descending=True, stable=True).indices
        used = counts[order].to(torch.float64).cumsum(0)
        # What more frequent entries make together decides, so the most frequent one always counts.
        frequent = torch.zeros(self.num_words, dtype=torch.bool, device=counts.device)
        frequent[order] = used - counts[order] < self.frequent_share * used[-1]
        generator = generator_of(self.seed)
        size = (self.num_words, self.shape.num_experts)
        drawn = torch.rand(size, generator=generator, device=generator.device)
        rank = drawn.argsort(-1).argsort(-1).to(counts.device)
        limit = torch.where(frequent, self.num_visible, 1)
        self.visible.copy_(rank < limit[:, None])
