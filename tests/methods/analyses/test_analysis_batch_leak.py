"""Who leaks across a batch: families, every router of the catalogue, in evaluation and as trained."""

from __future__ import annotations

from typing import Any

import pytest
from analysed_models import FAMILIES, TEXT
from families import tiny_model

import mixtura
from mixtura.errors import UserError
from mixtura.methods import header, names
from mixtura.running.observing.analyzing import analyze


@pytest.mark.parametrize("family", FAMILIES)
def test_real_families_do_not_leak(family: str) -> None:
    report = analyze(None, "batch_leak", model=tiny_model(family), tokens=TEXT)
    assert report.scalars["leaks"] == 0
    assert report.scalars["changed"] == 0
    assert "No leak was found" in report.sentences[0]


def test_which_routers_of_the_catalogue_leak() -> None:
    """None does in evaluation. As trained only those do that say they choose over the batch."""
    model: Any = tiny_model("qwen3_moe")
    leaking = set()
    for name in names("routers"):
        tags = header("routers", name).tags
        try:
            mixtura.set_router(model, name, train=True)
        except UserError:
            # It reads what a model of transformers does not hand to routers.
            continue
        for as_trained in (False, True):
            found = analyze(
                None, "batch_leak", model=model, tokens=TEXT, texts=1, draws=2, mates=5, as_trained=as_trained
            )
            if found.scalars["leaks"]:
                assert as_trained, f"{name} leaks in evaluation"
                assert "batch_dependent" in tags, f"{name} leaks and does not say so"
                leaking.add(name)
        mixtura.restore(model)
    wanted = {"base_layer", "gshard", "rectify_router", "sinkhorn", "switch", "transport_choice", "vmoe"}
    assert wanted <= leaking


def test_a_leak_is_told() -> None:
    model: Any = tiny_model("qwen3_moe")
    mixtura.set_router(model, "sinkhorn")
    found = analyze(None, "batch_leak", model=model, tokens=TEXT, as_trained=True)
    assert found.scalars["leaks"] == 1
    assert (found.scalars["changed"] or 0) > 0
    assert "leaks across a batch, routed as in training" in found.sentences[0]
