"""The Bayes mixture: models weighted by how well each has foretold the text so far."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.ensembles import Ensemble, Mixed, Text, all_logits, checked_shares

METHOD = {
    "paper": 145,
    "title": (
        "Ensembling Portfolio Strategies for Long-Term Investments: A Distribution-Free Preference Framework "
        "for Decision-Making and Algorithms"
    ),
    "tags": [],
}


class _State(NamedTuple):
    """Shares of the models when they spoke of the token after the newest column, and what they said."""

    shares: Tensor
    said: Tensor


@final
class BayesMixture(Ensemble):
    """Weigh models by the likelihood of the text so far: never much worse than the best of them, untrained.

    The portfolio of the paper holds what every component strategy holds, in shares of the wealth that each
    has made. Here a model's wealth is the probability that it gave to the text: w_i = q_i p_i(x_1..x_t), and
    the next token has probability sum_i w_i p_i / sum_i w_i. The loss of a whole text is then at most that of
    the best model plus -log q_i nats, log M with equal shares, however long the text is.

    With ``switching`` a part of all shares is dealt out anew after each token, so that another model can take
    over within a text; 1 keeps shares as they began, the plain mean of probabilities.

    Shapes:
        Logits [S, T, M, V] of M models to log-probabilities [S, T, V].

    Raises:
        SettingError: a share of the prior is negative or too large, or ``switching`` is not from 0 to 1.
        UserError: there is not one share for each model, or none is above 0.

    Example:
        >>> import torch
        >>> from mixtura.authoring.contracts.ensembles import said
        >>> sure = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
        >>> found = BayesMixture()(said(sure, token_ids=[0, 0, 0])).shares[0, :, 0]
        >>> [round(one, 4) for one in found.tolist()]
        [0.5, 0.6429, 0.7642]

    Differences from the paper:
        Models that foretell text in place of strategies that invest, and likelihood in place of wealth; the
        paper's "combinatorial" construction and its accelerated variant are known to us from the abstract
        alone, so this is the classical mixture by wealth. The first token is not weighed: nothing foretold
        it. ``switching`` is an addition (fixed share), 0 as in the paper.

    Reference:
        Ensembling Portfolio Strategies for Long-Term Investments: A Distribution-Free Preference Framework
        for Decision-Making and Algorithms (paper 145).
    """

    def __init__(self, *, prior: list[float] = [], switching: float = 0.0) -> None:  # noqa: B006
        super().__init__()
        self.prior = [self.within("prior", one, 0.0, 1e6) for one in prior]
        self.switching = self.within("switching", switching, 0.0, 1.0)

    def forward(self, text: Text, state: _State | None = None) -> Mixed:
        said = all_logits(text).log_softmax(-1)
        prior = checked_shares("BayesMixture", self.prior, text.num_models).to(said.device)
        shares, before = (None, None) if state is None else state
        columns = []
        for column in range(said.shape[1]):
            if before is None or shares is None:
                shares = prior.expand(len(said), -1)
            else:
                shares = self._learnt(shares, before, text, column, prior)
            columns.append(shares)
            before = said[:, column]
        weights = torch.stack(columns, dim=1)
        mixed = (weights[..., None] + said).logsumexp(2)
        assert shares is not None
        assert before is not None
        return Mixed(mixed, weights.exp(), _State(shares, before))

    def _learnt(
        self,
        shares: Float[Tensor, "S M"],
        said: Float[Tensor, "S M V"],
        text: Text,
        column: int,
        prior: Float[Tensor, " M"],
    ) -> Float[Tensor, "S M"]:
        """Shares after the token of a column, of what models had said of it."""
        token = text.token_ids[:, column, None, None].expand(-1, said.shape[1], 1)
        wealth = shares + said.gather(-1, token)[..., 0]
        total = wealth.logsumexp(-1, keepdim=True)
        # What no model held for possible says nothing of any, and neither does padding.
        tells = total.isfinite() & (text.valid[:, column, None] > 0)
        learnt = torch.where(tells, wealth - total, shares).exp()
        return torch.lerp(learnt, prior.exp().expand_as(learnt), self.switching).log()
