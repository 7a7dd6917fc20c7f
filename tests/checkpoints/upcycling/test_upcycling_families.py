"""Every dense family in every MoE family that can hold it computes there what it computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import dense_model, logits_of, save_dense
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.upcycling.apply import apply_upcycling, digests
from mixtura.checkpoints.upcycling.targets import OWN, TARGETS, choose_target
from mixtura.errors import UnknownNameError, UnsupportedModelError, UserError
from mixtura.types import Action, Plan
from mixtura.types.upcycling import Become, Build, Carry, SetRouter

EXPERTS, WIDTH = 4, 48
# Positions beyond the first 16 turn by other factors.
LONG = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 3.0, 4.0, 6.0], "original_max_position_embeddings": 16,
    },
}  # fmt: skip
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }
}  # fmt: skip
# A dense model by family and config, and the MoE families that hold it without and with a shared expert.
CASES: list[tuple[str, dict[str, Any], set[str], set[str]]] = [
    (
        "llama",
        LLAMA3,
        {"mixtral", "granitemoeshared", "qwen2_moe", OWN},
        {"granitemoeshared", "qwen2_moe", OWN},
    ),
    (
        "llama",
        {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 16},
        {"granitemoeshared", OWN},
        {"granitemoeshared", OWN},
    ),
    ("mistral", {"sliding_window": 5}, {"mixtral", OWN}, {OWN}),
    ("qwen2", {"tie_word_embeddings": True}, {"qwen2_moe"}, {"qwen2_moe"}),
    ("qwen3", {"head_dim": 16}, {"qwen3_moe", OWN}, {"dots1", OWN}),
    ("olmo2", {}, {"flex_olmo"}, set()),
    ("gemma", {"head_dim": 16}, {"granitemoeshared"}, {"granitemoeshared"}),
    ("phi3", LONG, {"mixtral", "granitemoeshared", "qwen2_moe", OWN}, {"granitemoeshared", "qwen2_moe", OWN}),
]


def plan_of(view: DenseView, target: str, *, shared: bool) -> Plan:
    """Copies, with half of the dense part in a shared expert if there is to be one."""
    empty = TARGETS[target].needs_shared and not shared
    width = WIDTH if shared else 16 if empty else 0
    actions: list[Action] = [Become(target, EXPERTS, 2, WIDTH, width, {}), Carry((0,), (1.0,))]
    for layer in range(view.shape.num_layers):
        scale = 0.5 if shared else 1.0
        actions += [Build(layer, expert, 0, None, scale) for expert in range(EXPERTS)]
        actions.append(SetRouter(layer, "normal", 0.2))
        if shared:
            actions.append(Build(layer, None, 0, None, 0.5))
        elif empty:
            actions.append(Build(layer, None, 0, (0, 16), 0.0))
    return Plan(digests([view])[0], tuple(actions))


@pytest.mark.parametrize(("family", "config", "without", "shared"), CASES)
def test_the_function_is_the_dense_one(
    family: str, config: dict[str, Any], without: set[str], shared: set[str], tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "dense", family, tokenizer=False, **config)
    view = DenseView(source)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(source))
    for has_shared, wanted in ((False, without), (True, shared)):
        become = Become("", EXPERTS, 2, WIDTH, WIDTH if has_shared else 0, {})
        assert {n for n, t in TARGETS.items() if not t.objections(view.traits, become)} == wanted
        for target in wanted:
            plan = plan_of(view, target, shared=has_shared)
            out = apply_upcycling(
                plan, {}, [view], tmp_path / f"{target}-{has_shared}", progress=False, shard_bytes=40_000
            )
            model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
            assert not any(info.values()), info
            assert model.config.model_type == target
            torch.testing.assert_close(logits_of(model), expected, atol=2e-5, rtol=1e-5)


def test_bytes_of_copies_are_the_sources(tmp_path: Path) -> None:
    dense_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    view = DenseView(tmp_path / "dense")
    plan = plan_of(view, "qwen3_moe", shared=False)
    out = apply_upcycling(plan, {}, [view], tmp_path / "out", progress=False)
    before, after = load_file(tmp_path / "dense/model.safetensors"), load_file(out / "model.safetensors")
    for name, value in before.items():
        places = [name]
        if ".mlp." in name:
            places = [name.replace(".mlp.", f".mlp.experts.{e}.") for e in range(EXPERTS)]
        assert all(torch.equal(after[place], value) for place in places), name


def test_a_family_that_cannot_hold_it_says_which_can(tmp_path: Path) -> None:
    view = DenseView(save_dense(tmp_path / "dense", "qwen3", tokenizer=False))
    become = Become("", 4, 2, 48, 0, {})
    with pytest.raises(UnsupportedModelError, match="mixtral cannot hold this model: it has not norms of qu"):
        choose_target(view.traits, become, "mixtral")
    with pytest.raises(UnsupportedModelError, match=r"; qwen3_moe and mixtura can$"):
        choose_target(view.traits, become, "mixtral")
    with pytest.raises(UnknownNameError, match="did you mean 'mixtral'"):
        choose_target(view.traits, become, "mixtrl")
    uneven = Become("", 4, 2, 48, 50, {})
    with pytest.raises(UnsupportedModelError, match=r"no ordinary MoE family .* no multiple of the others'"):
        choose_target(view.traits, uneven, None)


def test_what_is_no_dense_model_that_is_read(tmp_path: Path) -> None:
    from tiny_checkpoints import save_tiny

    with pytest.raises(UnsupportedModelError, match="Mixture-of-Experts model already"):
        DenseView(save_tiny(tmp_path / "moe"))
    with pytest.raises(UnsupportedModelError, match=r"gemma2 models .* its logits are capped"):
        DenseView(save_dense(tmp_path / "gemma2", "gemma2", tokenizer=False, head_dim=8))
    with pytest.raises(UnsupportedModelError, match="mlp_bias"):
        DenseView(save_dense(tmp_path / "biased", "llama", tokenizer=False, mlp_bias=True))


def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    view = DenseView(save_dense(tmp_path / "dense", tokenizer=False))
    good = plan_of(view, "mixtral", shared=False)
    out = tmp_path / "out"
    for actions, said in (
        (good.actions[1:], "one action become and one carry"),
        (tuple(a for a in good.actions if a != Build(1, 2, 0)), r"experts \[0, 1, 3\] of layer 1"),
        (tuple(a for a in good.actions if not isinstance(a, SetRouter)), "nothing of the router of layer 0"),
        ((*good.actions, Build(0, 3, 0, (40, 60))), "neurons 40 to 59 of layer 0, which has 48"),
        ((*good.actions, Build(0, 3, 5)), "source 5, and there are 0 to 0"),
        ((*good.actions, Build(0, 3, 0, "abc")), "the array abc, which does not lie beside it"),
    ):
        with pytest.raises(UserError, match=said):
            apply_upcycling(Plan(good.source_digest, actions), {}, [view], out, progress=False)
    with pytest.raises(UserError, match="made for checkpoints with the digests sha256:0"):
        apply_upcycling(Plan("sha256:0", good.actions), {}, [view], out, progress=False)
    assert not out.exists()
