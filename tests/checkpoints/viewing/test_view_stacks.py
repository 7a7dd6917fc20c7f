"""Models with several stacks of MoE layers: one index for one layer, one config field for each stack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model
from family_checks import TOLERANCE, distance, run

from mixtura.checkpoints.skeleton import empty_experts
from mixtura.checkpoints.stores import DiskStore
from mixtura.checkpoints.view import drop_experts, masked, open_model
from mixtura.errors import UserError
from mixtura.kernels import register_backend


def test_the_talkers_layers_are_numbered_after_the_thinkers() -> None:
    view = open_model(tiny_model("qwen3_omni_moe_whole"))
    assert [layer.index for layer in view.layers] == list(range(6))
    assert view.layer(4).name == "talker.model.layers.1.mlp.experts"
    assert view.layer(4).stack == "talker.model.layers.*.mlp.experts"
    assert [layer.num_experts for layer in view.layers] == [8, 8, 8, 4, 4, 4]
    # Where the thinker keeps its layers differs from release to release.
    fields = {stack: ".".join(field.path) for stack, field in view.count_fields.items()}
    assert {stack.replace(".language_model.", "."): path for stack, path in fields.items()} == {
        "thinker.model.layers.*.mlp.experts": "thinker_config.text_config.num_experts",
        "talker.model.layers.*.mlp.experts": "talker_config.text_config.num_local_experts",
    }


def test_stacks_lose_experts_on_their_own() -> None:
    model = tiny_model("qwen3_omni_moe_whole")
    drop_experts(model, {index: [0] for index in (3, 4, 5)})
    view = open_model(model)
    assert [layer.num_experts for layer in view.layers] == [8, 8, 8, 3, 3, 3]
    assert model.config.thinker_config.text_config.num_experts == 8
    assert model.config.talker_config.text_config.num_local_experts == 3


@pytest.mark.skipif("dots3_note" not in FAMILIES, reason="a family that this release does not have")
def test_the_vision_towers_layers_come_last() -> None:
    view = open_model(tiny_model("dots3_note_whole"))
    # layer 0 of the language model is dense
    assert [(layer.index, layer.name.split(".")[1]) for layer in view.layers] == [
        (1, "language_model"),
        (2, "language_model"),
        (3, "vision_tower"),
    ]


def test_experts_for_text_and_images_of_one_layer() -> None:
    model = tiny_model("ernie4_5_vl_moe")
    view = open_model(model)
    assert [(layer.index, layer.shape.d_expert) for layer in view.layers] == [
        (1, 16),
        (2, 16),
        (4, 8),
        (5, 8),
    ]
    assert len(set(view.count_fields.values())) == 1
    assert view.layers[0].shared_experts == view.layers[2].shared_experts
    drop_experts(model, {layer.index: [7] for layer in view.layers})
    assert model.config.text_config.moe_num_experts == 7


def test_index_of_a_dense_layer() -> None:
    view = open_model(tiny_model("deepseek_v3"))
    assert [layer.index for layer in view.layers] == [1, 2]
    with pytest.raises(UserError, match="layer 0 has no experts; the layers with experts are 1, 2"):
        view.layer(0)


def test_rows_beyond_the_experts_stay() -> None:
    model = tiny_model("inkling")
    layer = open_model(model).layers[0]
    assert layer.per_expert_tensors() == {
        f"{layer.block_name}.gate.weight": 0,
        f"{layer.block_name}.gate.e_score_correction_bias": 0,
    }
    whole = layer.tensor(layer.site.router_weight).clone()
    assert whole.shape[0] == 8 + 1
    drop_experts(model, {index: [0, 3] for index in range(3)})
    after = open_model(model).layers[0]
    assert torch.equal(after.tensor(after.site.router_weight), whole[[1, 2, 4, 5, 6, 7, 8]])
    assert after.router_weight().shape[0] == 6


def test_the_likeliest_field_is_not_the_only_one_tried() -> None:
    # Every size is 8 here; only one field sets the number of experts.
    model = tiny_model("qwen3_moe")
    config = type(model.config)(
        **{
            "vocab_size": 8,
            "hidden_size": 8,
            "intermediate_size": 8,
            "moe_intermediate_size": 8,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 8,
        }
    )
    view = open_model(type(model)(config))
    (field,) = set(view.count_fields.values())
    assert field.path == ("num_local_experts",)
    assert view.layers[0].per_expert_tensors() == {"model.layers.0.mlp.gate.weight": 0}


def test_a_model_whose_experts_run_from_a_store(tmp_path: Path) -> None:
    whole = tiny_model("gpt_oss")
    whole.save_pretrained(tmp_path)
    model = tiny_model("gpt_oss")
    on_disk = open_model(tmp_path)
    for layer in on_disk.layers:
        empty_experts(model, layer).mixtura_store = DiskStore(layer)
    view = open_model(model)
    assert [layer.shape for layer in view.layers] == [layer.shape for layer in on_disk.layers]
    for ours, theirs in zip(view.layers, open_model(whole).layers, strict=True):
        assert torch.equal(ours.expert(5).up, theirs.expert(5).up)
        assert torch.equal(ours.router_weight(), theirs.router_weight())
    with pytest.raises(UserError, match="are packed"):
        drop_experts(model, {0: [1]})
    drops = {0: [1], 1: [2], 2: [3]}
    register_backend()
    model.set_experts_implementation("mixtura")
    with masked(model, drops):
        expected = run(model)
    assert distance(expected, run(drop_experts(whole, drops))) < TOLERANCE
