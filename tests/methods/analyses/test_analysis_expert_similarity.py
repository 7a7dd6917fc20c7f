"""What the analysis expert_similarity promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from analysed_models import TEXT
from families import tiny_model
from recording import expert_output, record
from torch.nn import functional as F

from mixtura.checkpoints.view import MemoryView, open_model
from mixtura.running.observing.analyzing import analyze


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


class TestExpertSimilarity:
    def test_planted_twins_and_permuted_neurons(self) -> None:
        """All experts are one, each with its neurons in another order: matched wholly, outputs the same."""
        model: Any = tiny_model("qwen3_moe")
        layer = open_model(model).layer(0)
        experts: Any = model.get_submodule(layer.name)
        width = layer.shape.d_expert
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for expert in range(1, 8):
                order = torch.randperm(width, generator=generator)
                both = torch.cat([order, order + width])
                experts.gate_up_proj[expert] = experts.gate_up_proj[0][both]
                experts.down_proj[expert] = experts.down_proj[0][:, order]
        rows = analyze(None, "expert_similarity", model=model, tokens=TEXT).rows
        assert rows[0]["matched"] == pytest.approx(1, abs=1e-5)
        assert rows[0]["outputs"] == pytest.approx(1, abs=1e-5)
        assert abs(rows[0]["up"] or 0) < 0.5
        assert (rows[1]["matched"] or 0) < 0.9

    def test_numbers_are_those_of_plain_loops(self, model: Any) -> None:
        report = analyze(None, "expert_similarity", model=model, tokens=TEXT)
        layer = MemoryView(model).layers[-1]
        ups = [layer.expert(e).up.flatten() for e in range(8)]
        pairs = [F.cosine_similarity(ups[i], ups[j], dim=0).item() for i in range(8) for j in range(i)]
        assert report.rows[-1]["up"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
        seen = record(model, TEXT)[layer.name]
        experts, router = model.get_submodule(layer.name), layer.router_weight()
        agree = total = 0
        for one in seen:
            norms = torch.stack([expert_output(experts, one.hidden, e).norm() for e in range(8)])
            places = norms.argsort().argsort(), (router @ one.hidden).argsort().argsort()
            agree, total = agree + int((places[0] == places[1]).sum()), total + 8
        assert report.rows[-1]["rank_agreement"] == pytest.approx(agree / total, abs=0.02)
