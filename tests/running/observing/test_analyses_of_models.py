"""Analyses that run a model again: against plain computations on it, and it is as it was afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from families import tiny_model
from recording import expert_output, record, text
from torch import Tensor
from torch.nn import functional as F

import mixtura
from mixtura.checkpoints.view import MemoryView, open_model
from mixtura.data.tokens import TokenBatch
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.methods import create, header, names
from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.compute_oracle import ComputeOracle
from mixtura.methods.analyses.expert_masking import ExpertMasking
from mixtura.methods.analyses.route_explainer import RouteExplainer
from mixtura.running.observing import observe
from mixtura.running.observing.analyzing import analyze
from mixtura.running.observing.studying import ModelStudy, studying

TEXT = text([14, 14, 12, 9], [0, 1, 0, 1], seed=5)
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


@contextmanager
def studied(model: Any, *, steers: bool = False) -> Iterator[ModelStudy]:
    with studying(model, TEXT, steers=steers) as study:
        yield study


def shouting(index: int, quiet: float = 1.0) -> tuple[Any, int]:
    """A model in which the expert a layer uses most shouts and all others are scaled; and that expert."""
    model: Any = tiny_model("qwen3_moe")
    expert = int(observe(model, TEXT).layer(index).load.argmax())
    with torch.no_grad():
        for layer in open_model(model).layers:
            experts: Any = model.get_submodule(layer.name)
            loud = experts.down_proj[expert] * 100
            experts.down_proj *= quiet
            if layer.index == index:
                experts.down_proj[expert] = loud
    return model, expert


def own_words(model: Any) -> TokenBatch:
    """What a model says after a few beginnings, likeliest token by likeliest token."""
    ids = model.generate(TEXT.input_ids[:, :3], max_new_tokens=9, do_sample=False, eos_token_id=None)
    return TokenBatch(ids, torch.ones_like(ids), TEXT.domains, TEXT.domain_names)


def next_loss(logits: Tensor, after: int) -> float:
    return float(-logits.double().log_softmax(-1)[after])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_study_reads_is_what_the_model_does(family: str) -> None:
    """Logits, choices, weights and the experts' inputs, against hooks of the test's own; and all put back."""
    model: Any = tiny_model(family)
    before, hooks = copy.deepcopy(model.state_dict()), _num_hooks(model)
    seen = record(model, TEXT)
    ids = TEXT.input_ids[0].tolist()
    with studied(model, steers=True) as study:
        read = study.run([ids], scores=True)[0]
        torch.testing.assert_close(read.logits, model(TEXT.input_ids[:1], use_cache=False).logits[0])
        for layer in open_model(model).layers:
            own = seen[layer.name][: len(ids)]
            assert [sorted(one.experts) for one in own] == [
                sorted(x) for x in read.chosen[layer.index].tolist()
            ]
            hidden = torch.stack([one.hidden for one in own])
            torch.testing.assert_close(read.inputs[layer.index], hidden)
            assert read.scores[layer.index].shape == (len(ids), layer.num_experts)
            made = study.outputs(layer.index, hidden[:2])
            plain = expert_output(model.get_submodule(layer.name), hidden[1], 3)
            torch.testing.assert_close(made[3, 1], plain)
    assert _num_hooks(model) == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _num_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_study_leaves_the_mode_of_every_module(model: Any) -> None:
    one = copy.deepcopy(model).train()
    one.model.layers[0].eval()
    modes = [module.training for module in one.modules()]
    with studied(one, steers=True) as study:
        study.run([[3, 4, 5]], training=True)
    assert [module.training for module in one.modules()] == modes


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


def test_what_cannot_be_steered_is_said() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(UnsupportedModelError):
        analyze(None, "route_explainer", model=dense, tokens=TEXT)
    with pytest.raises(UserError, match="give analyze both model and tokens"):
        analyze(None, "route_explainer", model=dense)
    with pytest.raises(UserError, match="mixtura observe MODEL"):
        create("analyses", "batch_leak").measure(Evidence())
