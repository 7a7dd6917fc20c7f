"""What the decoder logit_averaging promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch
from deciding import several
from families import tiny_model

from mixtura.authoring.contracts._decoded import model, tokenizer
from mixtura.errors import UserError
from mixtura.methods.decoders.logit_averaging import LogitAveraging
from mixtura.running.decoders.entry import decode


@torch.no_grad()
def test_the_first_token_is_the_likeliest_of_the_mean() -> None:
    ids = torch.tensor([tokenizer().encode("abcde", add_special_tokens=False)])
    first, second = (model(seed)(ids).logits[0, -1] for seed in (0, 1))
    made = decode(model(), tokenizer(), "abcde", "logit_averaging", models=[model(1)], max_new_tokens=1)
    assert made.token_ids == (int((first + second).argmax()),)
    made = decode(
        model(),
        tokenizer(),
        "abcde",
        "logit_averaging",
        models=[model(1)],
        weights=[0.0, 1.0],
        max_new_tokens=4,
    )
    assert made.token_ids == decode(model(1), tokenizer(), "abcde", max_new_tokens=4).token_ids


def test_identical_models_are_one() -> None:
    made = decode(model(), tokenizer(), "abcde", "logit_averaging", models=[model()], max_new_tokens=8)
    assert made.token_ids == decode(model(), tokenizer(), "abcde", max_new_tokens=8).token_ids


def test_another_vocabulary_or_too_many_weights_are_refused() -> None:
    with pytest.raises(
        UserError, match="the further model has a vocabulary of 64 entries, the model one of 66"
    ):
        decode(model(), tokenizer(), "a", "logit_averaging", models=[tiny_model("mixtral")])
    with pytest.raises(UserError, match="LogitAveraging runs several models"):
        decode(model(), tokenizer(), "a", "logit_averaging")
    with pytest.raises(UserError, match="at most one for each of 2 models"):
        decode(model(), tokenizer(), "a", "logit_averaging", models=[model(1)], weights=[1.0, 1.0, 1.0])


def test_a_model_without_weight_is_not_heard_at_all() -> None:
    logits = torch.tensor([[[1.0, 2.0], [-math.inf, 5.0]]])
    assert LogitAveraging(weights=[1.0, 0.0]).mix(logits, several(["a"]))[0].tolist() == [1.0, 2.0]
