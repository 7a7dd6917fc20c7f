"""What the analysis class_attribution promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from analysed import trace_of

from mixtura.errors import SettingError, UserError
from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.class_attribution import ClassAttribution


def drawn(*shape: int, seed: int = 0, high: int = 8) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def chosen(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices


class TestClassAttribution:
    def trace(self, texts: int = 16, length: int = 12) -> Evidence:
        """Expert 6 of layer 1 is chosen by every second token of the second set, and by nobody else."""
        made = [chosen(texts * length, 6, 2, seed=seed) for seed in (1, 2, 3)]
        domains = tuple(place % 2 for place in range(texts))
        second = torch.repeat_interleave(torch.tensor(domains), length).bool() & (
            torch.arange(texts * length) % 2 == 0
        )
        made[1][second, 0] = 6
        return Evidence.of(trace_of(*made, num_experts=8, lengths=(length,) * texts, domains=domains))

    def test_the_planted_expert_is_first(self) -> None:
        report = ClassAttribution(epochs=40).measure(self.trace(texts=32))
        assert report.tables[0].rows[0][:2] == (1, 6)
        assert report.tables[0].rows[0][3:] == pytest.approx((0, 0.5))
        assert report.scalars["majority"] == 0.5
        assert report.scalars["accuracy"] is not None
        assert report.scalars["accuracy"] > 0.7
        assert "expert 6 of layer 1" in report.sentences[0]
        assert "--set 'experts=[[1,6]," in report.sentences[0]

    def test_too_few_texts_and_domains_are_said(self) -> None:
        with pytest.raises(UserError, match=r"3 texts of one and 3 of two.*--length"):
            ClassAttribution().measure(self.trace(texts=6))
        alone = trace_of(chosen(20, 8, 2), num_experts=8, names=("one",))
        with pytest.raises(UserError, match="two sets of texts"):
            ClassAttribution().measure(Evidence.of(alone))
        with pytest.raises(UserError, match="domains one, two"):
            ClassAttribution(domains=["one", "three"]).measure(self.trace())
        with pytest.raises(SettingError):
            ClassAttribution(epochs=0)
