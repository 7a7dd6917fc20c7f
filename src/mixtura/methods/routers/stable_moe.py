"""StableMoE: learn routing, distil it into a router on words alone, then freeze that one."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import UserError, check_range
from mixtura.methods._drawing import drawn, orthogonal
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import mean_of_valid, softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, by_position
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 106,
    "title": "StableMoE: Stable Routing Strategy for Mixture of Experts",
    "tags": [
        "lowest_index",
        "reads:training",
        "reads:step",
        "reads:token_ids",
        "reads:sequence_ids",
        "reads:positions",
        "reads:decoding",
        "may_read:history",
    ],
}


@final
class StableMoe(Router):
    """Two stages of training, so that tokens stop changing experts: learn the routing, then keep it.

    Before ``stage_one_steps`` steps a token takes the expert whose centroid has the highest product with
    it. The loss ``balance`` lowers sigmoids of experts above the mean load and raises others; ``distil``
    teaches a light router, which sees only an embedding of the word (``context="word"``) or its mean with
    that of the word before (``"bigram"``), the same choice. Afterwards, and at inference always, the light
    router decides, frozen. Weights are sigmoids of products; of equal scores the lowest index wins.

    Shapes:
        ``x [T, D]`` to T assignments; ``weight [E, D]``, ``words [V, W]``, ``light_weight [E, W]``.

    Raises:
        SettingError: a size is not in [1, 1e7], the steps not in [0, 1e8] or a coefficient in [0, 1e6].
        UserError: ``token_ids`` are not given, or for ``"bigram"`` ``positions`` or, in decoding, history.

    Example:
        >>> router = StableMoe(LayerShape(d_model=4, d_expert=8, num_experts=3), stage_one_steps=10)
        >>> inputs = RouterInput.of(torch.eye(4), token_ids=torch.arange(4), training=True, step=9)
        >>> sorted(router(inputs).losses)
        ['balance', 'distil']

    Differences from the paper:
        Losses are means over tokens; words beyond ``vocab_size`` share rows. An expert there contains its
        residual, so mixing output and input is a plain weight here. No convolution or transformer is taught.
        The released run weighs ``distil`` by 0.3 and lets experts take twice their share of tokens at most,
        the rest passing by; here the default is 1, and a limit is the layer's ``Capacity``. When the second
        stage begins the light router has no gradient any more, for which several processes that train
        together must be told to look (``find_unused_parameters``).

    Reference:
        StableMoE: Stable Routing Strategy for Mixture of Experts (paper 106); Hunter-DDM/stablemoe.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        stage_one_steps: int = 1000,
        vocab_size: int = 4096,
        width: int = 50,
        context: Literal["word", "bigram"] = "word",
        balance_coefficient: float = 0.3,
        distil_coefficient: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("StableMoe", "vocab_size", vocab_size, 1, 1e7)
        check_range("StableMoe", "width", width, 1, 1e7)
        check_range("StableMoe", "stage_one_steps", stage_one_steps, 0, 1e8)
        check_range("StableMoe", "balance_coefficient", balance_coefficient, 0, 1e6)
        check_range("StableMoe", "distil_coefficient", distil_coefficient, 0, 1e6)
        self.stage_one_steps, self.vocab_size = stage_one_steps, vocab_size
        self.width, self.context, self.seed = width, context, seed
        self.balance_coefficient, self.distil_coefficient = balance_coefficient, distil_coefficient
        self.weight = orthogonal(shape.num_experts, shape.d_model, seed)
        self.light_weight = orthogonal(shape.num_experts, width, seed + 1)
        self.words = drawn(seed + 2, vocab_size, width, scale=width)

    @property
    def num_chosen(self) -> int:
        return 1

    def forward(self, inputs: RouterInput) -> Routing:
        products = exact_logits(inputs.x, self.weight)
        light, history = self._light(inputs)
        learning = inputs.training and inputs.step < self.stage_one_steps
        logits = products if learning else light.detach()
        chosen = best(logits, 1)
        weights = torch.sigmoid(products).gather(-1, chosen)
        losses = {}
        if learning:
            counts = chosen[inputs.valid, 0].bincount(minlength=self.shape.num_experts).to(weights)
            excess = (counts / counts.mean().clamp(min=1e-6) - 1)[chosen[:, 0]]
            crowding = mean_of_valid(excess * weights[:, 0], inputs.valid)
            losses["balance"] = self.balance_coefficient * crowding
            missed = mean_of_valid(F.cross_entropy(light, chosen[:, 0], reduction="none"), inputs.valid)
            losses["distil"] = self.distil_coefficient * missed
        return self.chose(
            inputs, chosen, weights, scores=softmax(logits), logits=logits, losses=losses, history=history
        )

    def _light(self, inputs: RouterInput) -> tuple[Tensor, dict[str, Tensor]]:
        """The light router's logits, and what to keep for later tokens."""
        words = exact(self.words)[inputs.need("token_ids", "StableMoe") % self.vocab_size]
        if self.context == "word":
            return exact_logits(words, self.light_weight), {}
        if inputs.decoding and "values" not in inputs.history:
            raise UserError(
                'StableMoe with context="bigram" cannot decode without the history it returned before; '
                'hand it on, or choose context="word"'
            )
        table = by_position(words, inputs, "StableMoe")
        before = table[inputs.sequences, (inputs.need("positions", "StableMoe") - 1).clamp(min=0)]
        return exact_logits((words + before) / 2, self.light_weight), {"values": table}
