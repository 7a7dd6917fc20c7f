"""What the analysis compute_oracle promises beyond its kind's contract."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from analysed_models import TEXT, next_loss, studied
from families import tiny_model

from mixtura.checkpoints.view import open_model
from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.compute_oracle import ComputeOracle


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


class TestComputeOracle:
    def test_it_is_the_best_of_all_paths(self, model: Any) -> None:
        """Two layers, three sizes: all nine paths, computed by changing the model's own number of experts."""
        ids = TEXT.input_ids[2].tolist()
        method = ComputeOracle(texts=3, tokens=2, length=10)
        with studied(model, steers=True) as study:
            report = method.measure(Evidence(study=study))
            from mixtura.methods.analyses._paths import paths_of

            found = paths_of(study, ids[:6], ids[6], method.sizes, 100)
            few = paths_of(study, ids[:6], ids[6], method.sizes, 3)
        layers = len(open_model(model).layers)
        assert set(found) == set(product((2, 1, 0), repeat=layers))
        plain = next_loss(model(TEXT.input_ids[2:3, :6], use_cache=False).logits[0, -1], ids[6])
        assert found[(2,) * layers] == pytest.approx(plain, abs=1e-4)
        assert set(few) < set(found)
        assert all(few[path] == pytest.approx(found[path], abs=1e-4) for path in few)
        assert report.scalars["oracle"] is not None
        assert report.scalars["loss"] is not None
        assert report.scalars["oracle"] <= report.scalars["loss"]
        last = report.tables[0].rows[-1]
        assert last[1] == pytest.approx(report.scalars["oracle"])
        assert all(row[1] <= row[2] + 1e-9 for row in report.tables[0].rows)

    def test_an_expert_that_does_harm_is_left_out(self) -> None:
        """Where every expert of a layer only shouts at random, the oracle skips it more often than not."""
        model: Any = tiny_model("qwen3_moe")
        experts: Any = model.get_submodule(open_model(model).layer(0).name)
        with torch.no_grad():
            experts.down_proj.normal_(0, 30, generator=torch.Generator().manual_seed(0))
        with studied(model, steers=True) as study:
            rows = ComputeOracle(texts=4, tokens=4).measure(Evidence(study=study)).rows
        assert rows[0]["none"] is not None
        assert rows[0]["none"] > 0.4
