"""What the upcycler bam promises beyond its kind's contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_checkpoints import dense_model, logits_of, save_dense

import mixtura
from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.upcycling.blueprint import blueprint
from mixtura.errors import UserError
from mixtura.fitting.upcycling.planning import plan_of
from mixtura.methods.upcyclers.bam import Bam
from mixtura.running.loading import load_own_model
from mixtura.types import Plan
from mixtura.types.upcycling import CarryAttention, RouteAttention, UpcycleShape

FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "llama with biases": {"attention_bias": True},
}


@pytest.mark.parametrize("keys", ["own", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sources_that_are_alike_give_their_own_function(family: str, keys: str, tmp_path: Path) -> None:
    settings, name = FAMILIES[family], family.partition(" ")[0]
    sources = [save_dense(tmp_path / str(place), name, **settings) for place in range(3)]
    made = mixtura.compose(
        sources, tmp_path / "out", method="bam", settings={"keys": keys, "rest": "first"}, measure=False
    )
    assert (made.family, made.num_experts) == ("mixtura", 3)
    own = load_own_model(tmp_path / "out")
    torch.testing.assert_close(logits_of(own), logits_of(dense_model(name, **settings)), atol=2e-5, rtol=1e-5)


def test_each_expert_has_its_sources_attention_and_shared_keys_their_mean(tmp_path: Path) -> None:
    sources = [save_dense(tmp_path / str(seed), "llama", seed) for seed in range(2)]
    dense = [dense_model("llama", seed).model.layers[1].self_attn for seed in range(2)]
    for keys in ("own", "shared"):
        out = tmp_path / keys
        mixtura.compose(sources, out, method="bam", settings={"keys": keys}, measure=False)
        model = load_own_model(out)
        attention = model.model.layers[1].self_attn
        for member, source in zip(attention.members, dense, strict=True):
            assert torch.equal(member.q_proj.weight, source.q_proj.weight)
            assert torch.equal(member.o_proj.weight, source.o_proj.weight)
            assert keys == "shared" or torch.equal(member.k_proj.weight, source.k_proj.weight)
        if keys == "shared":
            mean = (dense[0].v_proj.weight + dense[1].v_proj.weight) / 2
            torch.testing.assert_close(attention.common.v_proj.weight, mean)
        # Rows that were drawn, others than those of the router of the feed-forward experts.
        rows, others = attention.gate, model.model.layers[1].mlp.router.weight
        assert 0.01 < float(rows.detach().std()) < 0.03
        assert not torch.allclose(rows, others)
        ids = torch.arange(3, 20)[None]
        again = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
        assert torch.equal(again, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


@torch.no_grad()
def test_parallel_layers_read_the_same_tokens(tmp_path: Path) -> None:
    sources = [save_dense(tmp_path / str(seed), "llama", seed) for seed in range(2)]
    mixtura.compose(sources, tmp_path / "out", method="bam", settings={"parallel": True}, measure=False)
    model = load_own_model(tmp_path / "out")
    assert model.config.parallel
    layer, seen = model.model.layers[0], {}
    for name in ("self_attn", "mlp"):
        getattr(layer, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[0]}))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, given: seen.update(read=given[0]))
    layer.register_forward_hook(lambda _, given, out: seen.update(x=given[0], out=out[0]))
    model(torch.arange(3, 20)[None])
    assert torch.equal(seen["read"], seen["x"])
    wanted = seen["x"] + seen["self_attn"] + seen["mlp"].view_as(seen["x"])
    torch.testing.assert_close(seen["out"], wanted)


def test_a_plan_that_lacks_an_attention_is_refused(tmp_path: Path) -> None:
    views = [DenseView(save_dense(tmp_path / str(seed), "llama", seed)) for seed in range(2)]
    shape = UpcycleShape(num_experts=2, top_k=1)
    plan, arrays = plan_of(Bam(), views, shape, None, None)
    first = next(a for a in plan.actions if isinstance(a, CarryAttention))
    lacking = Plan(plan.source_digest, tuple(a for a in plan.actions if a != first), plan.other_digests)
    with pytest.raises(UserError, match=r"query of attention for the experts \[1\]"):
        blueprint(views, lacking, arrays)
    other, arrays = plan_of(mixtura.create("upcyclers", "random_gates"), views, shape, None, None)
    mixed = Plan(other.source_digest, (*other.actions, RouteAttention(0, 0.02)), other.other_digests)
    with pytest.raises(UserError, match="experts of attention, which the model"):
        blueprint(views, mixed, arrays)


def test_settings_and_targets_that_do_not_go_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keys"):
        mixtura.create("upcyclers", "bam", keys="none")
    sources = [save_dense(tmp_path / str(seed), "llama", seed) for seed in range(2)]
    with pytest.raises(UserError, match="mixtral cannot hold"):
        mixtura.compose(sources, tmp_path / "out", method="bam", target="mixtral", measure=False)
    with pytest.raises(UserError, match="mixtura compose"):
        mixtura.upcycle(sources[0], tmp_path / "out", method="bam", measure=False)
    assert not (tmp_path / "out").exists()
