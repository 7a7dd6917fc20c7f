"""What the analysis expert_masking promises beyond its kind's contract."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from analysed_models import TEXT, own_words, shouting, studied
from families import tiny_model
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.expert_masking import ExpertMasking
from mixtura.running.observing.studying import studying


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


class TestExpertMasking:
    def test_loss_without_an_expert_is_that_of_a_model_that_lacks_it(self, model: Any) -> None:
        """Dropping the expert from the model chooses among the others, too."""
        with studied(model, steers=True) as study:
            report = ExpertMasking(experts=[[1, 3]], draws=0).measure(Evidence(study=study))
        from mixtura.checkpoints.view import drop_experts

        losses = []
        for one in (model, drop_experts(copy.deepcopy(model), {1: [3]})):
            logits = one(TEXT.input_ids, attention_mask=TEXT.attention_mask, use_cache=False).logits
            mask = TEXT.attention_mask[:, 1:].bool()
            losses.append(float(F.cross_entropy(logits[:, :-1][mask].double(), TEXT.input_ids[:, 1:][mask])))
        assert report.scalars["loss"] == pytest.approx(losses[0], rel=1e-4)
        assert report.scalars["change"] == pytest.approx(losses[1] - losses[0], abs=1e-4)

    def test_a_planted_expert_matters_more_than_random_ones(self) -> None:
        """One expert shouts, and the text is what the model itself says."""
        model, expert = shouting(1, quiet=0.001)
        with studying(model, own_words(model), steers=True) as study:
            found = ExpertMasking(experts=[[1, expert]]).measure(Evidence(study=study)).scalars
        assert abs(found["change"] or 0) > 3 * abs(found["random"] or 0)

    @pytest.mark.parametrize(
        ("experts", "message"),
        [
            ([[7, 0]], r"pairs of a layer \(.*\) and one of its experts, got \[7, 0\]"),
            ([[0, 8]], r"got \[0, 8\]"),
            ([[0, e] for e in range(7)], "must leave the 2 of layer 0"),
        ],
    )
    def test_wrong_experts_are_said(self, model: Any, experts: list[list[int]], message: str) -> None:
        with studied(model, steers=True) as study, pytest.raises(UserError, match=message):
            ExpertMasking(experts=experts).measure(Evidence(study=study))
