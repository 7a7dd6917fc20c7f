"""MoE embeddings: vectors by contrast of pairs, each domain's rows by a copy of their own."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import Passed, dense_routing, everyone
from mixtura.methods.estimators._domains import Grouped, parted
from mixtura.methods.estimators._pairs import copies, pairs_of, ranking_loss, recall_at_one

METHOD = {
    "paper": 33,
    "title": "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings",
    "tags": ["embeds", "reads:groups"],
}


@final
class MoeEmbeddings(Grouped):
    """Embed rows so that those that belong together are near, by an expert for each domain that is given.

    Sentence similarity, retrieval, contrastive learning; rows are features of texts, such as hashed words.
    ``y`` is, for each row, the number of the row that it belongs with. Of a batch of pairs each row is to
    be nearest to its partner among all partners (multiple negatives ranking, both ways). A row's domain
    (``groups``) decides its expert, with weight 1, and adds the domain's own vector. Experts begin as
    copies of one, so that at first domains differ by that vector alone.

    Shapes:
        ``X [n, d]``, ``y [n]`` of row numbers, ``groups [n]``; ``transform`` gives ``[n, d_model]`` of
        length 1.

    Raises:
        SettingError: ``scale`` is not in [1e-3, 1e4], ``d_model`` in [2, 4096], or a size, rate or
            ``random_state`` out of range.
        UserError: a number is missing, a partner does not exist, or a group was not learned of.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(60, 8))
        >>> X[30:] = X[:30] + 0.3 * X[30:]
        >>> partner = np.r_[30:60, 0:30]
        >>> model = MoeEmbeddings(epochs=10).fit(X, partner)
        >>> model.transform(X).shape, bool(model.score(X, partner) > 0.6)
        ((60, 32), True)

    Differences from the paper:
        A row is one vector, where the paper has a pre-trained encoder of tokens whose feed-forward layers
        become experts and the first of whose tokens becomes the domain's. The released code compares vectors
        that are neither of length 1 nor scaled, and in its "plus" loss takes as target the row that is most
        like both sides, which for such vectors may be another than the partner; here cosines times ``scale``
        and the partner. Rows of no domain known have the mean of all experts.

    Reference:
        Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings (paper 33, abstract);
        Gleghorn-Lab/Mixture-of-Experts-Sentence-Similarity.
    """

    ranges: ClassVar = {"scale": (1e-3, 1e4), "d_model": (2, 4096)}

    def __init__(
        self,
        *,
        d_model: int = 32,
        d_hidden: int = 64,
        scale: float = 20.0,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = 0.003,
        random_state: int = 0,
    ) -> None:
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.scale = scale
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, groups: Any = None) -> MoeEmbeddings:
        """Learn from pairs: ``y`` holds the number of each row's partner."""
        self.check_settings()
        X = self.fresh_rows(X)
        with self.in_words():
            firsts, seconds = pairs_of(y, len(X), type(self).__name__)
        numbers = self.learn_groups(groups, len(X))
        partners = np.column_stack([X[seconds], numbers[seconds]])
        self.learn(X[firsts], torch.from_numpy(partners), self.d_model, numbers[firsts])
        return self

    def transform(self, X: Any, groups: Any = None) -> np.ndarray:
        """The vectors of rows, of length 1."""
        X = self.rows(X)
        return self.output_of(X, self.numbers(groups, len(X))).numpy()

    def predict(self, X: Any, groups: Any = None) -> np.ndarray:
        """The vectors of rows, of length 1."""
        return self.transform(X, groups)

    def score(self, X: Any, y: Any, groups: Any = None) -> float:
        """Of how many rows the nearest other row is the partner."""
        with self.in_words():
            pairs_of(y, len(X), type(self).__name__)
        return recall_at_one(self.transform(X, groups), np.asarray(y))

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return _Network(d_in, d_out, self.d_hidden, len(self.groups_))

    def batch_loss(self, module: nn.Module, x: Tensor, target: Tensor, progress: float) -> Float[Tensor, ""]:
        mean, scale = (torch.from_numpy(one) for one in (self.mean_, self.scale_))
        partner = torch.cat([(target[:, :-1] - mean) / scale, target[:, -1:]], dim=1)
        return ranking_loss(module(x).output, module(partner).output, self.scale)

    def loss(self, passed: Passed, target: Tensor, progress: float) -> Float[Tensor, ""]:
        return ranking_loss(passed.output, target, self.scale)


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, d_out: int, width: int, num_domains: int) -> None:
        super().__init__()
        self.reads = nn.Linear(d_in, d_out)
        self.domains = nn.Parameter(0.02 * torch.randn(num_domains, d_out))
        self.norm = nn.LayerNorm(d_out)
        one = nn.Sequential(nn.Linear(d_out, width), nn.GELU(), nn.Linear(width, d_out))
        self.experts = copies(one, num_domains)

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        rows, domains = parted(x)
        num = len(self.experts)
        own = F.one_hot(domains.clamp(min=0), num).to(rows.dtype)
        weights = torch.where((domains < 0)[:, None], torch.full_like(own, 1 / num), own)
        h = self.reads(rows) + weights @ self.domains
        said = everyone(self.experts, self.norm(h))
        output = F.normalize(h + torch.einsum("te,etd->td", weights, said), dim=-1)
        return Passed(output=output, routing=dense_routing(weights, present=weights > 0), outputs=said)
