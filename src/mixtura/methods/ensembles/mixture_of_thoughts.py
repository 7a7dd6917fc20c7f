"""Mixture of Thoughts: frozen models exchange hidden states; the one that suits the prompt best answers."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError, UserError
from mixtura.methods.ensembles import Ensemble, Facts, Mixed, Text
from mixtura.methods.ensembles._crossing import Crossing, mean_of_prompt, spread_of_choices

METHOD = {
    "paper": 118,
    "title": "Mixture of Thoughts: Learning to Aggregate What Experts Think, Not Just What They Say",
    "tags": ["trained", "reads:prompt"],
}


@final
class MixtureOfThoughts(Ensemble):
    """Choose some models by the prompt, and let the best of them read what the others think, between layers.

    A router scores models by the prompt; the ``top_k`` best are active, the best is primary. Each model's
    layers are cut into as many stacks; after each stack the active models' hidden states are projected to a
    shared width, where the primary's attend to all of them and add back what they gather. All models stay
    frozen; the router and these interaction layers are trained by the loss of the text, with Gumbel noise and
    a straight-through choice, an entropy and a balance term.

    Shapes:
        Mean states of prompts [S, D] to scores [S, M]; states [S, T, D] of every model to log-probabilities
        [S, T, V].

    Raises:
        SettingError: a setting is out of range, or ``shared_width`` is no multiple of ``heads``.
        UserError: a model has fewer layers than ``stacks``, or there are fewer models than ``top_k``.

    Cost:
        All active models, and the first one for the prompt; the whole text again for every token, as states
        between layers are not kept.

    Example:
        >>> import torch
        >>> from mixtura.authoring.contracts.ensembles import said
        >>> text = said(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        >>> method = MixtureOfThoughts(top_k=2, stacks=1).eval()
        >>> method.build(text.facts)
        >>> primary = int(method(text).shares[0, 0].argmax())
        >>> torch.equal(method(text).log_probabilities, text.logits(primary).log_softmax(-1))
        True

    Differences from the paper:
        Known to us from summaries. The prompt is encoded by the first model (the mean of what its output
        layer is given) in place of a frozen DeBERTa-v3-base. Projections back begin at zero, so that an
        untrained one is the primary model exactly; the primary's logits carry the straight-through weight,
        which gives the router a gradient then. ``shared_width`` 64, ``heads`` 4, ``stacks`` 2, ``top_k`` 2
        and both terms' weights 0.01 are ours. Models here share a tokenizer.

    Reference:
        Mixture of Thoughts: Learning to Aggregate What Experts Think, Not Just What They Say (paper 118).
    """

    stages: ClassVar[tuple[str, ...]] = ("interaction",)

    def __init__(
        self,
        *,
        top_k: int = 2,
        stacks: int = 2,
        shared_width: int = 64,
        heads: int = 4,
        entropy: float = 0.01,
        balance: float = 0.01,
    ) -> None:
        super().__init__()
        self.top_k = self.within("top_k", top_k, 1, 1 << 10)
        self.stacks = self.within("stacks", stacks, 1, 1 << 10)
        self.shared_width = self.within("shared_width", shared_width, 1, 1 << 16)
        self.heads = self.within("heads", heads, 1, 1 << 10)
        self.entropy = self.within("entropy", entropy, 0.0, 1e3)
        self.balance = self.within("balance", balance, 0.0, 1e3)
        if shared_width % heads:
            raise SettingError(f"shared_width {shared_width} must be a multiple of heads {heads}")

    def build(self, facts: Facts) -> None:
        if self.top_k > len(facts.widths):
            raise UserError(f"there are {len(facts.widths)} models, fewer than top_k {self.top_k}")
        if self.stacks > min(facts.num_layers):
            raise UserError(f"a model has {min(facts.num_layers)} layers, fewer than stacks {self.stacks}")
        width = facts.widths[0]
        self.router = nn.Sequential(
            nn.RMSNorm(width),
            nn.Linear(width, self.shared_width),
            nn.GELU(),
            nn.Linear(self.shared_width, len(facts.widths)),
        )
        made = (Crossing(facts.widths, self.shared_width, self.heads) for _ in range(self.stacks))
        self.crossings = nn.ModuleList(made)

    def forward(self, text: Text, state: Any = None) -> Mixed:
        scores = self.router(mean_of_prompt(text)) if state is None else state
        noisy = scores
        if self.training:
            noisy = scores - torch.empty_like(scores).exponential_().clamp(min=1e-9).log()
        soft, order = noisy.softmax(-1), noisy.argsort(-1, descending=True)
        hard = torch.zeros_like(soft).scatter(-1, order[:, : self.top_k], 1.0)
        # As large as the choice, with the gradient of the probabilities.
        weights = hard + (soft - soft.detach())
        said: Tensor | None = None
        for primary in order[:, 0].unique().tolist():
            rows = (order[:, 0] == primary).nonzero()[:, 0]
            logits = self._thought(text, primary, rows, weights[rows]).float()
            said = logits.new_zeros(len(scores), *logits.shape[1:]) if said is None else said
            said = said.index_copy(0, rows, logits * weights[rows, primary, None, None])
        assert said is not None
        entropy, unevenness = spread_of_choices(scores, hard)
        terms = self.entropy * entropy + self.balance * unevenness
        shares = F.one_hot(order[:, :1], text.num_models).to(said).expand(*said.shape[:2], -1)
        return Mixed(said.log_softmax(-1), shares, scores, terms)

    def _thought(
        self, text: Text, primary: int, rows: Tensor, weights: Float[Tensor, "S M"]
    ) -> Float[Tensor, "S T V"]:
        active = [place for place in range(text.num_models) if bool((weights[:, place] > 0).any())]
        held = {place: text.states(place, self.stacks) for place in active if place != primary}

        def change(stack: int, states: Tensor) -> Tensor:
            others = {place: found[stack][rows] for place, found in held.items()}
            valid = text.seen[rows]
            changed: Tensor = self.crossings[stack](primary, states, others, weights, valid)
            return changed

        return text.changed(primary, self.stacks, rows, change)
