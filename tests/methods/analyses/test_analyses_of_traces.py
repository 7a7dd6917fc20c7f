"""Analyses of one trace or of several find what was put there, and agree with plain counting."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from analysed import trace_of
from scipy.optimize import linprog

from mixtura.errors import SettingError, UserError
from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses._congestion import best_gamma, equilibrium, tempered
from mixtura.methods.analyses.balance_duality import BalanceDuality
from mixtura.methods.analyses.class_attribution import ClassAttribution
from mixtura.methods.analyses.congestion import Congestion
from mixtura.methods.analyses.late_drops import LateDrops
from mixtura.methods.analyses.router_dynamics import RouterDynamics
from mixtura.methods.analyses.standing_committee import StandingCommittee
from mixtura.methods.analyses.token_routing import TokenRouting


def drawn(*shape: int, seed: int = 0, high: int = 8) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def chosen(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices


class TestStandingCommittee:
    def test_the_planted_committee_is_found(self) -> None:
        """Experts 2 and 5 serve every domain; each domain has specialists of its own besides."""
        domains = torch.arange(4).repeat_interleave(60)
        own = torch.tensor([0, 1, 3, 4])[domains]
        leading = torch.tensor([2, 5, 2, 5])[domains]
        choices = torch.stack([leading, torch.where(torch.arange(240) % 3 == 0, own, 7 - leading)], 1)
        names = ("a", "b", "c", "d")
        trace = trace_of(choices, num_experts=8, lengths=(60,) * 4, domains=(0, 1, 2, 3), names=names)
        assert StandingCommittee().find(trace) == {0: (2, 5)}
        row = StandingCommittee().measure(Evidence.of(trace)).rows[0]
        assert row["coverage"] == pytest.approx(1 - 80 / 480)
        assert row["advantage"] == pytest.approx((400 / 480 / 2) / (80 / 480 / 6))

    def test_it_is_the_authors_rule(self) -> None:
        """Against a plain reading of it: ranks, the absent one more, presence, nobody better in both."""
        made = chosen(400, 8, 3, seed=4)
        trace = trace_of(made, num_experts=8, lengths=(100,) * 4, domains=(0, 1, 2, 3), names=tuple("abcd"))
        weights = trace.layers[0].weight_sums.tolist()
        ranks: dict[int, list[int]] = {}
        for row in weights:
            order = sorted(range(8), key=lambda expert: -row[expert])[:3]
            for expert in range(8):
                ranks.setdefault(expert, []).append(order.index(expert) + 1 if expert in order else 4)
        able = [e for e, r in ranks.items() if sum(x < 4 for x in r) >= math.ceil(0.8 * 4)]
        if not able:
            most = max(sum(x < 4 for x in r) for r in ranks.values())
            able = [e for e, r in ranks.items() if sum(x < 4 for x in r) == most]
        points = {e: (np.mean(ranks[e]), np.var(ranks[e])) for e in able}
        best = [
            e
            for e in able
            if not any(
                points[o][0] <= points[e][0] and points[o][1] <= points[e][1] and points[o] != points[e]
                for o in able
            )
        ]
        assert StandingCommittee().find(trace)[0] == tuple(best)


class TestTokenRouting:
    def test_a_table_of_ids_is_explained_wholly(self) -> None:
        ids = drawn(600, high=40)
        report = TokenRouting().measure(
            Evidence.of(trace_of((ids % 8)[:, None], num_experts=8, token_ids=ids))
        )
        assert report.scalars["explained"] == pytest.approx(1)
        assert report.scalars["beyond_chance"] == pytest.approx(1)
        assert report.scalars["top_share"] == 1

    def test_choices_by_lot_are_explained_by_chance_alone(self) -> None:
        ids, made = drawn(4000, high=20), drawn(4000, 1, seed=1)
        report = TokenRouting().measure(Evidence.of(trace_of(made, num_experts=8, token_ids=ids)))
        assert report.scalars["explained"] == pytest.approx(report.scalars["by_chance"], abs=0.005)

    def test_mutual_information_is_that_of_plain_counting(self) -> None:
        ids, made = drawn(300, high=6, seed=2), chosen(300, 5, 2, seed=3)
        pairs = Counter((int(t), int(e)) for t, row in zip(ids, made, strict=True) for e in row)
        rows, columns = Counter[int](), Counter[int]()
        for (token, expert), count in pairs.items():
            rows[token] += count
            columns[expert] += count
        total = sum(pairs.values())
        information = sum(
            n / total * math.log(n * total / (rows[t] * columns[e])) for (t, e), n in pairs.items()
        )
        entropy = -sum(n / total * math.log(n / total) for n in columns.values())
        found = TokenRouting().measure(Evidence.of(trace_of(made, num_experts=5, token_ids=ids)))
        assert found.rows[0]["explained"] == pytest.approx(information / entropy)

    def test_what_is_learnt_early_is_seen(self) -> None:
        ids = drawn(600, high=10)
        last = (ids % 8)[:, None]
        half = torch.where(ids[:, None] < 5, last, (last + 1) % 8)
        traces = tuple(trace_of(made, num_experts=8, token_ids=ids) for made in (half, last))
        assert TokenRouting().measure(Evidence(traces=traces)).scalars["settled"] == pytest.approx(0.5)


class TestLateDrops:
    def test_against_a_queue(self) -> None:
        made = chosen(50, 4, 2, seed=5)
        report = LateDrops(factor=0.9, parts=5).measure(
            Evidence.of(trace_of(made, num_experts=4, lengths=(20, 30)))
        )
        dropped, taken = [0] * 5, [0] * 5
        for start, length in ((0, 20), (20, 30)):
            room, load = math.ceil(0.9 * length * 2 / 4), Counter[int]()
            for place in range(length):
                for expert in made[start + place].tolist():
                    taken[place * 5 // length] += 1
                    dropped[place * 5 // length] += load[expert] >= room
                    load[expert] += 1
        assert report.scalars["dropped"] == pytest.approx(sum(dropped) / sum(taken))
        assert report.scalars["last"] == pytest.approx(dropped[-1] / taken[-1])
        assert report.scalars["first"] == 0

    def test_room_for_all_drops_nothing(self) -> None:
        made = torch.zeros(40, 1, dtype=torch.int64)
        trace = trace_of(made, num_experts=4)
        assert LateDrops(factor=4.0).measure(Evidence.of(trace)).scalars["dropped"] == 0
        assert LateDrops(factor=1.0).measure(Evidence.of(trace)).scalars["dropped"] == 0.75


class TestRouterDynamics:
    def test_the_last_is_saturated_and_what_stays_does_not_change(self) -> None:
        first, last = chosen(200, 8, 2, seed=1), chosen(200, 8, 2, seed=2)
        traces = tuple(trace_of(one, num_experts=8) for one in (first, last, last))
        report = RouterDynamics().measure(Evidence(traces=traces, steps=(1, 2, 3)))
        same = sum(len(set(a) & set(b)) for a, b in zip(first.tolist(), last.tolist(), strict=True)) / 400
        assert report.rows[0] == pytest.approx(
            {"layer": 0, "saturation": same, "change": 0, "utilisation": 1}
        )
        assert [row[1] for row in report.tables[0].rows] == pytest.approx([same, 1, 1])
        assert [row[2] for row in report.tables[0].rows[1:]] == pytest.approx([1 - same, 0])

    def test_a_dead_expert_is_not_used(self) -> None:
        made = chosen(200, 7, 2)
        traces = tuple(trace_of(made, num_experts=8) for _ in range(2))
        assert RouterDynamics().measure(Evidence(traces=traces)).scalars["utilisation"] == 7 / 8

    def test_other_text_other_models_and_falling_steps_are_refused(self) -> None:
        one = trace_of(chosen(20, 8, 2), num_experts=8, token_ids=drawn(20))
        with pytest.raises(UserError, match="observe each with --save"):
            RouterDynamics().measure(Evidence.of(one))
        with pytest.raises(UserError, match="different text"):
            RouterDynamics().measure(Evidence.of(replace(one, token_ids=drawn(20, seed=9)), one))
        with pytest.raises(UserError, match="different layers"):
            RouterDynamics().measure(Evidence.of(trace_of(chosen(20, 9, 2), num_experts=9), one))
        with pytest.raises(UserError, match="rising"):
            RouterDynamics().measure(Evidence(traces=(one, one), steps=(5, 2)))


class TestCongestion:
    QUALITY = np.array([0.0, 0.4, 1.1, -0.6, 0.2, 0.9])

    @pytest.mark.parametrize("gamma", [0.5, 5.0, 40.0])
    def test_the_equilibrium_and_the_planted_coefficient(self, gamma: float) -> None:
        shares = equilibrium(self.QUALITY, gamma)
        made = np.exp(self.QUALITY - gamma * shares)
        assert shares == pytest.approx(made / made.sum(), abs=1e-9)
        assert best_gamma(self.QUALITY, shares)[0] == pytest.approx(gamma, rel=1e-3)

    def test_the_ends(self) -> None:
        assert equilibrium(self.QUALITY, 0.0) == pytest.approx(tempered(self.QUALITY, 1.0))
        assert equilibrium(self.QUALITY, 1e6) == pytest.approx(np.full(6, 1 / 6), abs=1e-4)

    def test_a_planted_load_is_read_from_a_trace(self) -> None:
        """Every token's logits are the qualities; experts are drawn by the shares of a known coefficient."""
        shares = torch.tensor(equilibrium(self.QUALITY, 8.0))
        ids = torch.multinomial(shares.expand(6000, 6), 1, generator=torch.Generator().manual_seed(0))
        logits = torch.tensor(self.QUALITY).expand(6000, 6).float()
        trace = trace_of(ids, num_experts=6, lengths=(100,) * 60, logits=[logits])
        row = Congestion(draws=20).measure(Evidence.of(trace)).rows[0]
        low, gamma, high = row["low"], row["gamma"], row["high"]
        assert low is not None
        assert gamma is not None
        assert high is not None
        assert low <= gamma <= high
        assert gamma == pytest.approx(8.0, rel=0.2)


class TestBalanceDuality:
    LOGITS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor(
        [1.0, 0.0, 0.0, 0.0]
    )

    def trace(self) -> Evidence:
        made = self.LOGITS.topk(2).indices
        return Evidence.of(trace_of(made, num_experts=4, logits=[self.LOGITS]))

    def test_the_dual_bounds_the_even_assignment_and_comes_near(self) -> None:
        """Against the linear program itself."""
        scores = self.LOGITS.double().softmax(-1).numpy()
        tokens, experts = scores.shape
        equal = np.zeros((tokens + experts, tokens * experts))
        for token in range(tokens):
            equal[token, token * experts : (token + 1) * experts] = 1
        for expert in range(experts):
            equal[tokens + expert, expert::experts] = 1
        wanted = np.concatenate([np.full(tokens, 2.0), np.full(experts, tokens * 2 / experts)])
        best = -linprog(-scores.flatten(), A_eq=equal, b_eq=wanted, bounds=(0, 1)).fun / tokens
        found = BalanceDuality(steps=400, rate=0.002).measure(self.trace()).rows[0]
        assert found["dual"] is not None
        assert found["dual_after"] is not None
        assert found["dual"] > found["dual_after"] >= best - 1e-9
        assert found["dual_after"] == pytest.approx(best, abs=0.002)
        assert found["after"] is not None
        assert found["violation"] is not None
        assert found["after"] < found["violation"] / 2

    def test_by_sign_no_token_moves_the_wrong_way(self) -> None:
        made = [
            BalanceDuality(update=update, rate=0.3, steps=200).measure(self.trace()).scalars["wrong"]
            for update in ("sign", "proportional")
        ]
        assert made[0] == 0
        assert made[1] is not None
        assert made[1] > 0


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
