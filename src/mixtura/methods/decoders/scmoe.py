"""Contrasting a model's routing with a weaker one of the same model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, LayerFacts, Prompt, View
from mixtura.types.steering import Steering

METHOD = {
    "paper": 8,
    "title": "Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast",
    "tags": ["steers"],
}


@final
class Scmoe(Decoder):
    """Self-contrast: push the next token away from what the same model says with weaker routing.

    Logits are (1 + beta) times those of the model's own routing minus beta times those of a routing that
    gives every token one expert only, that of rank ``rank`` (1 is the router's second choice). Tokens whose
    probability under the own routing is below ``alpha`` times the likeliest's are out. With ``beta`` 0 the
    greedy token is the model's own.

    Shapes:
        Logits [2, V] to [V].

    Raises:
        SettingError: a setting is out of range.
        UserError: a layer has no expert of that rank.

    Cost:
        One forward pass a token, of two rows: weights outside experts are read once, and K + 1 experts a
        layer. The prompt is read under both routings, each with a cache of keys and values of its own.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> strong, weak = Scmoe().open(sample_prompt())[0].views
        >>> strong.plain, weak.steering[0].ranks.tolist()
        (True, [1, 2])

    Differences from the paper:
        Both routings run in one pass of two rows, where its code keeps two models. The weak routing is the
        paper's best, the second expert alone; the code's default is the first. An end token may be drawn at
        any time. The temperature of the weak logits is 1, the code's default. Where sampling is asked for, it
        is from the contrasted logits.

    Reference:
        Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast (paper 8); its
        code, DavidFanzz/SCMoE at 857fad7, ``decodingmethod/utils.py``.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"beta": 0.0, "alpha": 0.0}

    def __init__(self, *, beta: float = 0.5, alpha: float = 0.1, rank: int = 1) -> None:
        check_range("Scmoe", "beta", beta, 0, 100)
        check_range("Scmoe", "alpha", alpha, 0, 1)
        check_range("Scmoe", "rank", rank, 0, 10_000)
        self.beta = beta
        self.alpha = alpha
        self.rank = rank

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        weak = View(prompt.facts.steer_all(self._weak))
        return (Branch(views=(View(), weak)),)

    def mix(self, logits: Float[Tensor, "B W V"], candidates: Sequence[Candidate]) -> Float[Tensor, "B V"]:
        strong, weak = logits.unbind(1)
        least = strong.amax(-1, keepdim=True) + (math.log(self.alpha) if self.alpha else -math.inf)
        mixed = (1 + self.beta) * strong - self.beta * weak if self.beta else strong
        # What the model cannot say at all is no number in the contrast.
        return mixed.masked_fill((strong < least) | strong.isneginf(), -math.inf)

    def _weak(self, layer: LayerFacts) -> Steering:
        if self.rank >= layer.num_experts:
            raise UserError(
                f"rank of Scmoe must be less than the {layer.num_experts} experts of layer {layer.index}, "
                f"got {self.rank}"
            )
        return Steering(ranks=torch.tensor([self.rank, self.rank + 1]))
