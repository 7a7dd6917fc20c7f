"""Experts are chosen by the frame, its guess, domain and accent; unknown ones have an embedding, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators.speech_moe2 import SpeechMoe2


def accents(seed: int, num: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Windows of three frames of two numbers, of two domains and two accents that mean the opposite."""
    draw = np.random.default_rng(seed)
    accent, domain = np.arange(num) % 2, draw.integers(0, 2, num)
    X = draw.normal(size=(num, 6)) + 0.5 * domain[:, None]
    y = np.where(accent == 0, X[:, 2] > 0.25, X[:, 2] < 0.25)
    return np.column_stack([X, domain, accent]), y.astype(int)


def model(**more: object) -> SpeechMoe2:
    settings = {"domain_column": 6, "accent_column": 7, "frames": 3, "num_experts": 2, "epochs": 12}
    return SpeechMoe2(**{**settings, **more})


def test_the_choice_is_of_the_router_of_the_frame_its_guess_domain_and_accent() -> None:
    X, y = accents(0)
    learned = model(epochs=3).fit(X, y)
    module, x = learned.module_, learned._given(X[:6], None)
    with torch.no_grad():
        h = module.body.embed(x[:, :6].reshape(6, 3, 2))
        h = h + module.body.mixes[0](h.transpose(1, 2)).transpose(1, 2).relu()
        rows = module.body.norms[0](h).float()
        gate, first = module.gates[0], module(x).more[0]
        taken = torch.empty(18, dtype=torch.long)
        taken[first.token_ids] = first.expert_ids
        for row in range(6):
            for frame in range(3):
                guess = int(module.local(x[row, 2 * frame : 2 * frame + 2]).argmax())
                parts = [rows[row, frame], gate.words[guess], gate.domains[int(X[row, 6])]]
                joined = torch.cat([one.double() for one in (*parts, gate.accents[int(X[row, 7])])])
                assert int((gate.weight.double() @ joined).argmax()) == taken[3 * row + frame]


def test_the_accent_decides_and_is_needed() -> None:
    (X, y), (new, truth) = accents(0), accents(1)
    learned = model(epochs=25).fit(X, y)
    assert learned.score(new, truth) > 0.85
    unknown = new.copy()
    unknown[:, 7] = -1
    assert learned.score(unknown, truth) < 0.7
    # Rows of another accent have other experts.
    swapped = new.copy()
    swapped[:, 7] = 1 - new[:, 7]
    assert not torch.equal(learned.route(new).scores, learned.route(swapped).scores)


def test_local_guesses_are_learned_first_and_stay() -> None:
    X, y = accents(0)
    y = (X[:, 2] > 0).astype(int)
    learned = model(epochs=10).fit(X, y)
    frames = learned.module_.windows(learned._given(X, None))[:, 1]
    assert (learned.module_.local(frames).argmax(1).numpy() == y).mean() > 0.95
    assert not any(one.requires_grad for one in learned.module_.local.parameters())


def test_nothing_known_is_a_table_like_any_other() -> None:
    X, y = accents(0)
    routing = SpeechMoe2(frames=2, epochs=1).fit(X, y).route(X[:7])
    assert routing.num_tokens == 14
    assert len(routing.expert_ids) == 14


def test_what_cannot_be_is_refused() -> None:
    X, y = accents(0)
    with pytest.raises(SettingError, match="must be two of 8 columns, beside others, got 6 and 6"):
        model(accent_column=6).fit(X, y)
    with pytest.raises(SettingError, match="must be two of 2 columns"):
        model(domain_column=0, accent_column=1).fit(X[:, 6:], y)
    with pytest.raises(SettingError, match="frames of SpeechMoe2 must divide the 6 numbers"):
        model(frames=5).fit(X, y)
    X[0, 7] = 16
    with pytest.raises(
        UserError, match="accents of SpeechMoe2 \\(column 7\\) are whole numbers from -1 to 15"
    ):
        model().fit(X, y)
