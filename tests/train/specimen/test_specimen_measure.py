"""Load and specialisation, by hand on small shares."""

from __future__ import annotations

import pytest
import torch

from mixtura.data.text import DOMAINS
from mixtura.train.specimen.measure import held_out_documents, load_by_layer, specialisation

SHARES = torch.tensor(
    [
        [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]],
        [[0.25] * 4, [0.25] * 4, [0.25] * 4],
    ],
    dtype=torch.float64,
)


def test_load_of_each_layer() -> None:
    first, second = load_by_layer(SHARES)
    assert first["max_over_mean"] == pytest.approx(4 / 3)
    assert first["dead"] == 1
    assert second == pytest.approx({"max_over_mean": 1.0, "min_over_mean": 1.0, "entropy": 1.0, "dead": 0})
    assert first["entropy"] < 1.0


def test_specialisation_of_each_layer() -> None:
    first, second = specialisation(SHARES, num_top=1)
    assert first["total_variation"] == {"code and prose": 0.0, "code and tasks": 1.0, "prose and tasks": 1.0}
    assert first["top"] == [{"expert": 2, "domain": "tasks", "part": 1.0}]
    assert set(second["total_variation"].values()) == {0.0}
    assert second["top"][0]["part"] == pytest.approx(1 / 3)


def test_every_domain_has_held_out_text() -> None:
    for domain in DOMAINS:
        assert sum(len(document.text) for document in held_out_documents(domain)) > 50_000
