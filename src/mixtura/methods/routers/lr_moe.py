"""LR-MoE: a language classifier, shared by all layers, sends each frame to its language's expert."""

from __future__ import annotations

from typing import final

from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import mean_of_valid, softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 75,
    "title": ("Language-Routing Mixture of Experts for Multilingual and Code-Switching Speech Recognition"),
    "tags": [
        "expert_rows",
        "token_independent",
        "lowest_index",
        "shared",
        "stateful",
        "reads:state",
        "reads:labels",
    ],
}


@final
class LrMoe(Router):
    """Tell each token's language once, and send it to that language's expert in every MoE layer.

    Expert e is that of language e. The first layer classifies tokens (frames of speech, in the paper)
    and hands its logits on as ``state``; later layers follow them, so one classifier routes all layers.
    It is trained with the model by cross-entropy against the labels ``language`` where these are known,
    in the loss ``language``, times ``coefficient``; nothing else teaches it unless ``weighted``. An
    expert's weight is 1, or the language's probability if ``weighted``. Of equal logits the lowest index
    wins. A language need not be known to route.

    Shapes:
        ``x [T, D]`` to T assignments, ``state [T, E]``; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``coefficient`` is not in [0, 1e6].
        UserError: a label is of a language without expert, or the state is not of as many languages.

    Example:
        >>> import torch
        >>> router = LrMoe(LayerShape(d_model=4, d_expert=8, num_experts=3))
        >>> first = router(RouterInput.of(torch.eye(4)))
        >>> later = router(RouterInput.of(torch.zeros(4, 4), layer=1, state=first.state))
        >>> bool((later.expert_ids == first.expert_ids).all()), sorted(later.losses)
        (True, [])

    Differences from the paper:
        The language loss there is for a speech recogniser's frames without alignment; here it is
        cross-entropy per token. A layer that is given no state classifies its own tokens by the same
        rows. Only the abstract and its summary were at hand.

    Reference:
        Language-Routing Mixture of Experts for Multilingual and Code-Switching Speech Recognition (paper
        75, abstract).
    """

    def __init__(
        self, shape: LayerShape, *, coefficient: float = 0.3, weighted: bool = False, seed: int = 0
    ) -> None:
        super().__init__(shape)
        self.coefficient = self.within("coefficient", coefficient, 0, 1e6)
        self.weighted = weighted
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        handed, losses = self.handed(inputs, self.shape.num_experts), {}
        if handed is None:
            logits = exact_logits(inputs.x, self.weight)
            languages = inputs.labels.get("language")
            if languages is not None:
                known = inputs.valid & (languages >= 0)
                if (languages[known] >= self.shape.num_experts).any():
                    raise UserError(
                        f"LrMoe has experts for languages 0 to {self.shape.num_experts - 1}, got label "
                        f"{int(languages[known].max())}; give it one expert a language"
                    )
                each = F.cross_entropy(logits, languages.where(known, 0), reduction="none")
                losses["language"] = self.coefficient * mean_of_valid(each, known)
        else:
            logits = exact(handed)
        scores = softmax(logits)
        chosen = best(logits, 1)
        weights = scores.gather(-1, chosen) if self.weighted else scores.new_ones(chosen.shape)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits, losses=losses, state=logits)
