"""The Bayes mixture against plain products of probabilities, and its bound."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from mixtura.authoring.contracts._read_together import team
from mixtura.authoring.contracts.ensembles import said
from mixtura.errors import SettingError
from mixtura.methods import create
from mixtura.methods.ensembles import chosen
from mixtura.methods.ensembles.bayes_mixture import BayesMixture

TOKENS = [5, 3, 60, 3, 3, 17, 0, 41]


def each_of(tokens: list[int]) -> torch.Tensor:
    """What two models of two families say of every token, one forward pass each, without the core."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = [model(input_ids=ids).logits[0] for model in team(BayesMixture()).models]
    return torch.stack(logits).double().softmax(-1)


@pytest.mark.parametrize("prior", [[], [3.0, 1.0]])
def test_each_token_is_a_mixture_by_wealth(prior: list[float]) -> None:
    each, shares = each_of(TOKENS), prior or [1.0, 1.0]
    with torch.no_grad():
        mixed = BayesMixture(prior=prior)(team(BayesMixture()).read(torch.tensor([TOKENS])))
    wealth = [share / sum(shares) for share in shares]
    for column in range(len(TOKENS)):
        if column:
            wealth = [w * float(each[m, column - 1, TOKENS[column]]) for m, w in enumerate(wealth)]
        wanted = sum(w * each[m, column] for m, w in enumerate(wealth)) / sum(wealth)
        assert torch.allclose(mixed.log_probabilities[0, column].exp().double(), wanted, atol=1e-5)
        assert mixed.shares[0, column].tolist() == pytest.approx([w / sum(wealth) for w in wealth], rel=1e-3)


def test_the_loss_of_a_text_is_that_of_mixed_likelihoods() -> None:
    # Chained token by token, the mixture's likelihood is the mean of the models' likelihoods.
    each = each_of(TOKENS)
    alone = [
        sum(math.log(each[m, t, after]) for t, (_, after) in enumerate(pairwise(TOKENS))) for m in (0, 1)
    ]
    with torch.no_grad():
        mixed = BayesMixture()(team(BayesMixture()).read(torch.tensor([TOKENS[:-1]])))
    loss = -float(chosen(mixed.log_probabilities, torch.tensor([TOKENS[1:]])).sum())
    assert loss == pytest.approx(-math.log(sum(map(math.exp, alone)) / 2), abs=1e-4)
    assert loss <= -max(alone) + math.log(2) + 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_worse_than_the_best_model_by_more_than_the_log_of_their_number(seed: int) -> None:
    torch.manual_seed(seed)
    tokens = torch.randint(0, 4, (200,)).tolist()
    text = said(2 * torch.randn(6, 4), token_ids=tokens)
    targets = torch.tensor([[*tokens[1:], -100]])
    loss = -float(chosen(BayesMixture()(text).log_probabilities, targets).sum())
    alone = [-float(chosen(text.logits(m).log_softmax(-1), targets).sum()) for m in range(6)]
    assert min(alone) - 1e-2 <= loss <= min(alone) + math.log(6) + 1e-2


def test_switching_is_the_fixed_share_of_the_prior() -> None:
    each, rate = each_of(TOKENS), 0.1
    with torch.no_grad():
        mixed = BayesMixture(switching=rate)(team(BayesMixture()).read(torch.tensor([TOKENS])))
    shares = np.array([0.5, 0.5])
    for column in range(len(TOKENS)):
        if column:
            shares = shares * np.array([float(each[m, column - 1, TOKENS[column]]) for m in (0, 1)])
            shares = (1 - rate) * shares / shares.sum() + rate * 0.5
        assert mixed.shares[0, column].tolist() == pytest.approx(shares.tolist(), rel=1e-3)


def test_switching_all_is_the_mean_of_probabilities() -> None:
    with torch.no_grad():
        mixed = BayesMixture(switching=1)(team(BayesMixture()).read(torch.tensor([TOKENS])))
    assert torch.allclose(mixed.log_probabilities.exp()[0].double(), each_of(TOKENS).mean(0), atol=1e-5)


def test_what_no_model_held_for_possible_tells_nothing() -> None:
    never = torch.tensor([[0.0, float("-inf")], [1.0, float("-inf")]])
    found = BayesMixture()(said(never, token_ids=[0, 1, 1, 0]))
    assert torch.allclose(found.shares, torch.full((1, 4, 2), 0.5))
    assert not found.log_probabilities.isnan().any()


def test_a_model_that_is_silenced_for_good_leaves_the_others() -> None:
    sure = torch.tensor([[0.0, float("-inf")], [0.0, 0.0]])
    found = BayesMixture()(said(sure, token_ids=[0, 1, 0, 0]))
    assert found.shares[0, -1].tolist() == [0.0, 1.0]


def test_numbers_of_numpy_are_numbers() -> None:
    made = create("ensembles", "bayes_mixture", switching=np.float32(0.25), prior=[np.int64(1), np.int64(3)])
    assert made.switching == 0.25
    assert made(said(torch.zeros(2, 2))).shares[0, 0].tolist() == [0.25, 0.75]


@pytest.mark.parametrize("switching", [-0.1, 1.1, float("nan")])
def test_switching_out_of_range_is_refused(switching: float) -> None:
    with pytest.raises(SettingError, match="switching"):
        BayesMixture(switching=switching)
