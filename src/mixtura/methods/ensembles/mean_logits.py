"""The mean of several models' logits, token by token."""

from __future__ import annotations

from typing import Any, final

import torch

from mixtura.methods.ensembles import Ensemble, Mixed, Text, all_logits, checked_shares

METHOD = {
    "paper": 187,
    "title": "Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate",
    "tags": [],
}


@final
class MeanLogits(Ensemble):
    """Average what several models say, as logits: a product of experts, which nothing has to be trained for.

    A token is probable where all models hold it for probable, so that one model that is sure it does not come
    can forbid it. The baseline that a trained ensemble has to beat, beside the best of the models alone.

    Shapes:
        Logits [S, T, M, V] of M models to log-probabilities [S, T, V].

    Raises:
        SettingError: a weight is negative or too large.
        UserError: there is not one weight for each model, or none is above 0.

    Example:
        >>> import torch
        >>> from mixtura.authoring.contracts.ensembles import said
        >>> text = said(torch.tensor([[0.0, 2.0], [0.0, -2.0]]))
        >>> MeanLogits()(text).log_probabilities.exp()[0, 0].tolist()
        [0.5, 0.5]

    Differences from the paper:
        Only its way of composing models; growing and training them is not done here. Weights are an addition.

    Reference:
        Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate (paper 187).
    """

    def __init__(self, *, weights: list[float] = []) -> None:  # noqa: B006 - never changed
        super().__init__()
        self.weights = [self.within("weights", one, 0.0, 1e6) for one in weights]

    def forward(self, text: Text, state: Any = None) -> Mixed:
        del state
        logits = all_logits(text)
        shares = checked_shares("MeanLogits", self.weights, text.num_models).exp().to(logits.device)
        # A share of 0 must silence a model also where it says minus infinity.
        heard = shares > 0
        mean = torch.einsum("stmv,m->stv", logits[:, :, heard], shares[heard])
        return Mixed(mean.log_softmax(-1), shares.expand(*text.token_ids.shape, -1))
