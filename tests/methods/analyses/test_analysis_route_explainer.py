"""What the analysis route_explainer promises beyond its kind's contract."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from analysed_models import TEXT, next_loss, own_words, shouting, studied
from families import tiny_model

from mixtura.checkpoints.view import open_model
from mixtura.errors import UserError
from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.route_explainer import RouteExplainer
from mixtura.running.observing import observe
from mixtura.running.observing.studying import studying


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


class TestRouteExplainer:
    def test_influence_is_that_of_the_expert_taken_away(self, model: Any) -> None:
        """In the last layer a choice of the last token touches nothing else: its router's row may be cut."""
        last = [layer.index for layer in open_model(model).layers][-1]
        ids = TEXT.input_ids[0]
        with studied(model, steers=True) as study:
            report = RouteExplainer(text=0, token=7).measure(Evidence(study=study))
        rows = [row for row in report.tables[0].rows if row[0] == last]
        prefix, after = ids[None, :8], int(ids[8])
        plain = next_loss(model(prefix, use_cache=False).logits[0, -1], after)
        from mixtura.checkpoints.view import drop_experts

        for row in rows:
            without = drop_experts(copy.deepcopy(model), {last: [int(str(row[1]))]})
            loss = next_loss(without(prefix, use_cache=False).logits[0, -1], after)
            assert row[3] == pytest.approx(loss - plain, abs=1e-4)
        assert report.scalars["loss"] == pytest.approx(plain, abs=1e-4)
        assert report.figures[0].values[-1] == pytest.approx(tuple(row[3] for row in rows))

    def test_a_planted_expert_is_named_in_the_sentence(self) -> None:
        """One expert of one layer shouts, and all others of all layers hardly speak."""
        model, expert = shouting(1, quiet=0.001)
        words = own_words(model)
        with studying(model, words, steers=True) as study:
            chosen = study.run([words.input_ids[0].tolist()])[0].chosen[1].tolist()
            place = max(i for i, row in enumerate(chosen[:-1]) if expert in row)
            trace = observe(model, words)
            report = RouteExplainer(token=place).measure(Evidence(traces=(trace,), study=study))
        assert f"Expert {expert} of layer 1, which is mostly used by domain" in report.sentences[0]
        assert [row[:2] for row in report.tables[0].rows if abs(row[3]) > 0.01] == [(1, expert)]

    def test_what_is_not_there_is_said(self, model: Any) -> None:
        with studied(model, steers=True) as study:
            for settings, message in (
                ({"text": 9}, "no text 9; there are 4"),
                ({"token": 13}, "give one from 0 to 12"),
            ):
                with pytest.raises(UserError, match=message):
                    RouteExplainer(**settings).measure(Evidence(study=study))
