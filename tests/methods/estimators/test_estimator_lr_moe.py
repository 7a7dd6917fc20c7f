"""A frame runs its language's expert in every layer; languages are learned where known, never read after."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators import one_each
from mixtura.methods.estimators._frames import FrameNetwork, labels_of, middle
from mixtura.methods.estimators.lr_moe import LrMoe


def speech(seed: int, num: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Windows of three frames of two numbers in two languages, of which one means the opposite."""
    draw = np.random.default_rng(seed)
    language = np.arange(num) % 2
    X = draw.normal(size=(num, 6))
    X[:, 3] += 4 * language
    y = np.where(language == 0, X[:, 2] > 0, X[:, 2] < 0)
    return np.column_stack([X, language]), y.astype(int)


def model(**more: object) -> LrMoe:
    return LrMoe(**{"language_column": 6, "frames": 3, "num_experts": 2, "epochs": 8, **more})


def test_the_middle_frame_alone_is_labelled() -> None:
    assert middle(torch.tensor([2, -1]), 3).tolist() == [-1, 2, -1, -1, -1, -1]
    found = labels_of({"domain": torch.tensor([1, 0])}, 2, whole=True)
    assert found["domain"].tolist() == [1, 1, 0, 0]


def test_frames_through_convolutions_and_one_expert_by_loops() -> None:
    torch.manual_seed(0)
    network = FrameNetwork(2, 3, LrMoe(num_experts=2, num_layers=2, d_model=4, d_hidden=5)).eval()
    x, ids = torch.randn(2, 3, 2), torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]])
    scores = torch.eye(2)
    made, _ = network(x, lambda rows, layer, state: one_each(ids[layer], scores[ids[layer]]))
    for row in range(2):
        h = [network.embed(x[row, t]) for t in range(3)]
        for layer in range(2):
            kernel, padded = network.mixes[layer], [torch.zeros(4), *h, torch.zeros(4)]
            mixed = [
                kernel.bias + sum(kernel.weight[:, :, k] @ padded[t + k] for k in range(3)) for t in range(3)
            ]
            h = [old + new.relu() for old, new in zip(h, mixed, strict=True)]
            expert = [network.experts[layer][ids[layer][3 * row + t]] for t in range(3)]
            h = [one + expert[t](network.norms[layer](one)) for t, one in enumerate(h)]
        assert torch.allclose(made[row], network.head(h[1].relu()), atol=1e-5)


def test_one_classifier_routes_all_layers_and_the_loss_is_by_hand() -> None:
    X, y = speech(0)
    learned = model().fit(X, y)
    x = learned._given(X[:20], None)
    module = learned.module_.train()
    passed = module(x)
    first, second = passed.more
    assert torch.equal(first.expert_ids, second.expert_ids)
    assert sorted(first.losses) == ["language"]
    assert not second.losses
    # Of the three frames of a window the middle one is taught.
    shares = first.logits[1::3].double().softmax(-1)
    by_hand = -np.mean([float(shares[n, int(X[n, 6])].detach().log()) for n in range(20)])
    assert float(first.losses["language"].detach()) == pytest.approx(0.3 * by_hand, rel=1e-5)
    module.eval()


def test_a_known_language_runs_its_expert_and_the_column_is_not_read_afterwards() -> None:
    X, y = speech(0)
    learned = model(epochs=15).fit(X, y)
    new, truth = speech(1)
    routing = learned.route(new)
    taken = torch.empty(routing.num_tokens, dtype=torch.long)
    taken[routing.token_ids] = routing.expert_ids
    assert (taken[1::3].numpy() == new[:, 6]).mean() > 0.9
    assert (routing.weights == 1).all()
    other = new.copy()
    other[:, 6] = 99.5
    assert np.array_equal(learned.predict_proba(new), learned.predict_proba(other))
    assert learned.score(new, truth) > 0.85


def test_rows_of_unknown_languages_may_be_learned() -> None:
    X, y = speech(0)
    X[::3, 6] = -1
    assert model(epochs=15).fit(X, y).score(*speech(1)) > 0.8
    # With none known nothing teaches the languages.
    X[:, 6] = -1
    module = model(epochs=1).fit(X, y).module_.train()
    (loss,) = module(torch.zeros(2, 7, dtype=torch.float64)).more[0].losses.values()
    assert float(loss.detach()) == 0
    module.eval()


def test_without_a_column_experts_are_weighted() -> None:
    X, y = speech(0)
    routing = LrMoe(frames=3, epochs=1).fit(X[:, :6], y).route(X[:5, :6])
    assert routing.num_tokens == 15
    assert (routing.weights < 1).all()


def test_what_cannot_be_is_refused() -> None:
    X, y = speech(0)
    with pytest.raises(SettingError, match="frames of LrMoe must divide the 6 numbers of a row"):
        model(frames=4).fit(X, y)
    with pytest.raises(SettingError, match="the column of languages of LrMoe must be one of 6"):
        model().fit(X[:, :6], y)
    X[0, 6] = 2
    with pytest.raises(UserError, match="languages of LrMoe \\(column 6\\) are whole numbers from -1 to 1"):
        model().fit(X, y)
