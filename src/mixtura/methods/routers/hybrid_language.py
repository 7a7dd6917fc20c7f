"""Apollo-MoE's hybrid routing: while it learns, a token's language always has its expert among the chosen."""

from __future__ import annotations

from typing import final

import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import plain_logits
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 91,
    "title": (
        "Efficiently Democratizing Medical LLMs for 50 Languages via a Mixture of Language Family Experts"
    ),
    "tags": ["expert_rows", "token_independent", "lowest_index", "reads:labels", "reads:training"],
}


@final
class HybridLanguage(Router):
    """Send tokens to their best experts, and in training to the expert of their language in any case.

    Multilingual models, language families, languages with few texts. Outside training this is the softmax of
    the router's logits and its ``top_k`` best. In training, where a token's label ``language`` is known and
    its expert not among the chosen, that expert takes the last one's place. ``families`` gives the expert of
    each language, so that many languages share few experts; without it language l has expert l.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], or ``families`` name experts that do not exist.
        UserError: a label is of a language without expert.

    Example:
        >>> router = HybridLanguage(LayerShape(d_model=4, d_expert=8, num_experts=3), families=[0, 2, 2])
        >>> labels = {"language": torch.tensor([1, 2, 0, -1])}
        >>> routing = router(RouterInput.of(torch.eye(4), training=True, labels=labels))
        >>> bool({0, 1} <= set(routing.token_ids[routing.expert_ids == 2].tolist()))
        True

    Differences from the paper:
        As in the released code, whose option to leave weights as they are is ``renormalize=False``. There
        every token must have a language in training; here unknown ones (negative) are routed plainly.

    Reference:
        Efficiently Democratizing Medical LLMs for 50 Languages via a Mixture of Language Family Experts
        (paper 91); FreedomIntelligence/ApolloMoE.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        families: list[int] | None = None,
        renormalize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.families = families
        self.renormalize = renormalize
        self.seed = seed
        if families is not None and not set(families) <= set(range(shape.num_experts)):
            raise SettingError(
                f"families of HybridLanguage must name experts from 0 to {shape.num_experts - 1}, got "
                f"{families}"
            )
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = plain_logits(inputs.x, self.weight)
        scores = softmax(logits)
        chosen = best(scores, self.top_k)
        languages = inputs.labels.get("language")
        if inputs.training and languages is not None:
            experts = list(range(self.shape.num_experts)) if self.families is None else self.families
            known = inputs.valid & (languages >= 0)
            if (languages[known] >= len(experts)).any():
                raise UserError(
                    f"HybridLanguage knows languages 0 to {len(experts) - 1}, got label "
                    f"{int(languages[known].max())}; give families an entry for it"
                )
            wanted = torch.tensor(experts, device=chosen.device)[languages.where(known, 0)]
            is_missing = known & (chosen != wanted[:, None]).all(1)
            last = torch.where(is_missing, wanted, chosen[:, -1])
            chosen = torch.cat([chosen[:, :-1], last[:, None]], dim=1)
        weights = scores.gather(-1, chosen)
        weights = to_sum_one(weights) if self.renormalize else weights
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)
