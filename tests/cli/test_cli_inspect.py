"""`mixtura inspect`: numbers that agree with the model itself, from headers, for people and programs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from families import tiny_model
from tiny_checkpoints import run_fresh, run_mixtura, save_tiny

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.summary import summarize
from mixtura.checkpoints.view import open_model


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "mixtral"])
def test_parameters_and_bytes_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    summary = summarize(open_checkpoint(tmp_path))
    persistent = dict(model.state_dict(keep_vars=True))
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in persistent.values()}
    assert summary.num_parameters == sum(sizes.values())
    assert summary.num_bytes == 4 * summary.num_parameters
    assert summary.family == model.config.model_type
    routed = 0
    for layer, held in zip(summary.layers, open_model(model).layers, strict=True):
        own = sum(parameter.numel() for parameter in model.get_submodule(held.name).parameters())
        assert layer.expert_parameters * layer.num_experts == own
        assert layer.expert_num_bytes == 4 * layer.expert_parameters
        routed += own
    assert summary.expert_parameters == routed
    left_out = sum((layer.num_experts - layer.top_k) * layer.expert_parameters for layer in summary.layers)
    assert summary.active_parameters == summary.num_parameters - left_out


def test_a_token_reads_one_row_of_an_embedding_that_is_not_the_output_layer(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    summary = summarize(open_checkpoint(tmp_path))
    embedding = model.model.embed_tokens.weight
    assert summary.bytes_per_token == 4 * (summary.active_parameters - embedding.numel() + embedding.shape[1])


def test_router_groups_bias_and_shared_experts_are_told(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    summary = summarize(open_checkpoint(tmp_path))
    layer = summary.layers[0]
    assert summary.num_layers == 3
    assert [one.index for one in summary.layers] == [1, 2]
    assert (layer.router, layer.has_correction_bias, layer.has_shared_experts) == ("sigmoid", True, True)
    assert (layer.num_groups, layer.top_groups) == (2, 1)


@pytest.mark.slow
def test_command_prints_for_people_and_for_programs(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny", "deepseek_v3")
    people = run_mixtura("inspect", str(tmp_path / "tiny"))
    assert people.returncode == 0, people.stderr
    for expected in ("deepseek_v3", "1 to 2", "sigmoid, bias for the choice", "1 of 2", "a token reads"):
        assert expected in people.stdout
    programs = run_mixtura("inspect", str(tmp_path / "tiny"), "--json")
    values = json.loads(programs.stdout)
    assert values["model"] == "tiny"
    assert values["family"] == "deepseek_v3"
    assert len(values["layers"]) == 2
    assert values["layers"][0]["num_experts"] == 8


@pytest.mark.slow
def test_missing_models_end_with_one_sentence(tmp_path: Path) -> None:
    result = run_fresh("inspect", str(tmp_path / "nothing"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: there is no directory")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_opening_reads_headers_only_whatever_the_size(tmp_path: Path) -> None:
    """A checkpoint of tens of GB, its weights a hole in a file: reading them would take far longer."""
    save_tiny(tmp_path, "qwen3_moe")
    before = summarize(open_checkpoint(tmp_path))
    shard = tmp_path / "model.safetensors"
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    size = 40 << 30
    header["unused.weight"] = {"dtype": "U8", "shape": [size], "data_offsets": [len(raw) - 8 - length, 0]}
    header["unused.weight"]["data_offsets"][1] = header["unused.weight"]["data_offsets"][0] + size
    text = json.dumps(header).encode()
    with shard.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        file.truncate(file.tell() + size)
    start = time.process_time()
    after = summarize(open_checkpoint(tmp_path))
    assert time.process_time() - start < 5
    assert after.unused_num_bytes == size
    assert after.num_bytes == before.num_bytes


@pytest.mark.slow
def test_without_a_model_it_is_the_specimen() -> None:
    result = run_mixtura("inspect", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert (values["model"], values["family"]) == ("specimen", "qwen3_moe")
    assert values["active_parameters"] < values["num_parameters"] / 2
