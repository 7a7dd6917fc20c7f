"""SpeechMoE2: a local and two global embeddings help the router, those of domain and accent."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import UserError, check_range
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import mean_of_valid, softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 74,
    "title": "SpeechMoE2: Mixture-of-Experts Model with Improved Routing",
    "tags": ["token_independent", "reads:token_ids", "may_read:labels"],
}


@final
class SpeechMoe2(Router):
    """Route by the token joined with embeddings of what it says, of its domain and of its accent.

    The router's rows read the layer's input, a local embedding (of the token's vocabulary entry) and two
    global ones, of the labels ``domain`` and ``language`` (whose varieties accents are). A label that is
    negative or not given has an embedding of its own, so each may be left out. The expert of highest
    probability is taken, weighted by it; of equal ones the lowest index wins. Two losses: ``sparsity``,
    the mean 1-norm of each token's probabilities scaled to length 1, and ``importance``, E times the sum
    of squares of the experts' mean probabilities.

    Shapes:
        ``x [T, D]`` to T assignments; parameters ``weight [E, D + 3 * width]``, ``words``, ``domains``
        and ``accents`` of ``width`` columns.

    Raises:
        SettingError: a size is not in [1, 1e7], or a coefficient not in [0, 1e6].
        UserError: ``token_ids`` are not given, or a label is beyond its number.

    Example:
        >>> router = SpeechMoe2(LayerShape(d_model=4, d_expert=8, num_experts=3))
        >>> inputs = RouterInput.of(torch.eye(4), token_ids=torch.arange(4))
        >>> router(inputs).load.sum().item()
        4

    Differences from the paper:
        There the local embedding comes from a network trained to recognise graphemes, and tokens are
        frames of speech; here it is a table of ``vocab_size`` rows, entries beyond which share rows. The
        losses are those of the work it improves on, as known from summaries. Only the abstract and
        summaries were at hand.

    Cost:
        With a single token a call what counts is the number of operations: three embeddings are looked up
        and joined, labels are checked, and there are two losses. Many tokens take about top-k's time.

    Reference:
        SpeechMoE2: Mixture-of-Experts Model with Improved Routing (paper 74, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        vocab_size: int = 4096,
        num_domains: int = 16,
        num_accents: int = 16,
        width: int = 16,
        sparsity_coefficient: float = 0.1,
        importance_coefficient: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        sizes = {"vocab_size": vocab_size, "num_domains": num_domains, "num_accents": num_accents}
        for name, size in {**sizes, "width": width}.items():
            check_range("SpeechMoe2", name, size, 1, 1e7)
        check_range("SpeechMoe2", "sparsity_coefficient", sparsity_coefficient, 0, 1e6)
        check_range("SpeechMoe2", "importance_coefficient", importance_coefficient, 0, 1e6)
        self.vocab_size, self.num_domains, self.num_accents = vocab_size, num_domains, num_accents
        self.width = width
        self.sparsity_coefficient = sparsity_coefficient
        self.importance_coefficient = importance_coefficient
        self.seed = seed
        self.weight = drawn(seed, shape.num_experts, shape.d_model + 3 * width)
        self.words = drawn(seed + 1, vocab_size, width, scale=width)
        self.domains = drawn(seed + 2, num_domains + 1, width, scale=width)
        self.accents = drawn(seed + 3, num_accents + 1, width, scale=width)

    def forward(self, inputs: RouterInput) -> Routing:
        words = self.words[inputs.need("token_ids", "SpeechMoe2") % self.vocab_size]
        parts = (words, self._of("domain", self.domains, inputs), self._of("language", self.accents, inputs))
        logits = exact_logits(torch.cat([exact(part) for part in (inputs.x, *parts)], -1), self.weight)
        scores = softmax(logits)
        chosen = best(scores, 1)
        means = scores[inputs.valid].sum(0) / inputs.valid.sum().clamp(min=1)
        sparsity = mean_of_valid(F.normalize(scores, dim=-1).sum(-1), inputs.valid)
        return self.chose(
            inputs,
            chosen,
            scores.gather(-1, chosen),
            scores=scores,
            logits=logits,
            losses={
                "sparsity": self.sparsity_coefficient * sparsity,
                "importance": self.importance_coefficient * self.shape.num_experts * means.square().sum(),
            },
        )

    def _of(self, name: str, table: nn.Parameter, inputs: RouterInput) -> Tensor:
        """The embeddings of labels, the last row for those not known."""
        unknown = table.shape[0] - 1
        labels = inputs.labels.get(name, torch.full_like(inputs.valid, unknown, dtype=torch.long))
        if name in inputs.labels and (labels[inputs.valid] >= unknown).any():
            raise UserError(f"SpeechMoe2 knows {unknown} labels {name!r}; give it as many as there are")
        return table[labels.where((labels >= 0) & (labels < unknown), unknown)]
