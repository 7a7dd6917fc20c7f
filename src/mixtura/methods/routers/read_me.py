"""Read-ME: a small network on the words decides once, before the model runs, for all layers."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import SettingError, check_range
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._causal import attended_before
from mixtura.methods.routers._shared import best, by_position
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 121,
    "title": "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
    "tags": [
        "shared",
        "stateful",
        "reads:state",
        "reads:token_ids",
        "reads:positions",
        "reads:sequence_ids",
        "reads:history",
    ],
}


@final
class ReadMe(Router):
    """Choose experts from the words alone, the same ones in every layer, ahead of the model's forward pass.

    One instance serves all layers. In the first, a small transformer block (embeddings of ``width``, one head
    of causal attention with rotary positions, a feed-forward) reads the sequence's token ids and gives the
    logits; they are handed on as ``state`` and every later layer follows them. As hidden states are not
    read, experts can be fetched and batched before the model runs. Each token goes to the ``top_k`` of
    highest probability, weighted by it, or by 1 if not ``weighted``; of equal ones the lowest index.
    `distillation` is the loss that teaches the router which experts a dense model's activations fall in.

    Shapes:
        ``token_ids [T]`` to ``T * top_k`` assignments, ``state [T, E]``; parameters ``embedding [V, W]``,
        four of ``[W, W]``, two of the feed-forward, ``head [E, W]``. Ids of ``num_words`` or more begin
        again at 0.

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``width`` not an even number in [2, 4096], or
            ``num_words`` not in [1, 1e8].
        UserError: token ids or positions are not given.

    Example:
        >>> router = ReadMe(LayerShape(d_model=4, d_expert=8, num_experts=3), num_words=10)
        >>> words = torch.tensor([1, 2, 2])
        >>> first = router(RouterInput.of(torch.zeros(3, 4), token_ids=words, positions=torch.arange(3)))
        >>> later = router(RouterInput.of(torch.ones(3, 4), layer=1, state=first.state))
        >>> bool((later.expert_ids == first.expert_ids).all())
        True

    Differences from the paper:
        There the router is one step of turning a dense model into experts: argmax, weight 1, trained by
        `distillation` in turns with the model. Here the weight is the probability by default, so that the
        task trains it too, and embeddings start from noise instead of the model's. The released block is
        normed before both of its parts, has biases, several layers and heads and a feed-forward of its own
        width, and does not scale products; here it is one head, a feed-forward four times as wide and one
        norm at the end.

    Cost:
        Many tokens take top-k's time or less, for words are looked up instead of multiplied. With a
        single token a call what counts is the number of operations, and a transformer block, however
        small, has several times those of top-k; later layers have none of it.

    Reference:
        Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design (paper 121);
        repository VITA-Group/READ-ME.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 1,
        width: int = 64,
        weighted: bool = True,
        num_words: int = 32768,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("ReadMe", "top_k", top_k, 1, shape.num_experts)
        check_range("ReadMe", "width", width, 2, 4096)
        if width % 2:
            raise SettingError(f"width of ReadMe must be even, for its rotary positions, got {width}")
        check_range("ReadMe", "num_words", num_words, 1, 1e8)
        self.top_k, self.width, self.weighted = top_k, width, weighted
        self.num_words, self.seed = num_words, seed
        self.embedding = drawn(seed, num_words, width, scale=width)
        self.attention = drawn(seed + 1, 4, width, width)
        self.up = drawn(seed + 2, 4 * width, width)
        self.down = drawn(seed + 3, width, 4 * width)
        self.head = drawn(seed + 4, shape.num_experts, width)

    def forward(self, inputs: RouterInput) -> Routing:
        logits, history = self.handed(inputs, self.shape.num_experts), {}
        if logits is None:
            words = exact(self.embedding)[inputs.need("token_ids", "ReadMe") % self.num_words]
            table = by_position(torch.cat([words, torch.ones_like(words[:, :1])], -1), inputs, "ReadMe")
            history = {"values": table}
            hidden = words + attended_before(words, table, inputs, self.attention, "ReadMe")
            hidden = hidden + exact_logits(F.silu(exact_logits(hidden, self.up)), self.down)
            logits = exact_logits(F.layer_norm(hidden, hidden.shape[-1:]), self.head)
        scores = softmax(logits)
        chosen = best(scores, self.top_k)
        weights = scores.gather(-1, chosen) if self.weighted else torch.ones_like(scores[:, : self.top_k])
        return self.chose(
            inputs, chosen, weights, scores=scores, logits=exact(logits), state=logits, history=history
        )

    def distillation(self, logits: Float[Tensor, "T E"], overlap: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
        """How far logits are from each expert's share of a dense model's activations: two cross entropies."""
        hard = F.cross_entropy(logits, overlap.argmax(-1), label_smoothing=0.5)
        return 0.75 * hard + 0.25 * F.cross_entropy(logits, softmax(10 * (overlap - overlap.mean(-1, True))))
