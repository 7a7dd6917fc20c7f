"""Paths and directories that cannot be opened, and the sentence each gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    DbrxConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from mixtura.checkpoints.view import open_model
from mixtura.errors import CheckpointError, UnsupportedModelError, UserError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with one matrix per expert."""
    path = tmp_path_factory.mktemp("model") / "good"
    tiny_model("qwen3_moe").save_pretrained(path, save_original_format=True, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "broken"))


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps(config))


def refuses(path: Path | str, kind: type[UserError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        open_model(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_the_copy_opens(broken: Path) -> None:
    view = open_model(broken)
    assert len(view.files) > 2
    assert view.model_type == "qwen3_moe"


def test_no_such_path(tmp_path: Path) -> None:
    refuses(tmp_path / "nothing", CheckpointError, "no directory")


def test_not_a_model(tmp_path: Path) -> None:
    refuses(tmp_path, CheckpointError, "not a model", "config.json")


def test_a_file_instead_of_a_directory(good: Path) -> None:
    refuses(good / "config.json", CheckpointError, "give the directory")


def test_missing_shard(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    refuses(broken, CheckpointError, shard.name, "finish the download")


def test_truncated_shard(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    refuses(broken, CheckpointError, shard.name, "truncated")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, (4).to_bytes(8, "little") + b"[1]x"])
def test_garbage_shard(broken: Path, content: bytes) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(content)
    refuses(broken, CheckpointError, shard.name, "damaged")


def change_tensors(path: Path, fragment: str, change: Any) -> None:
    """Apply ``change`` to the stored tensors whose name contains ``fragment``; `None` removes one."""
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        changed = {}
        for name, tensor in tensors.items():
            value = change(tensor) if fragment in name else tensor
            if value is not None:
                changed[name] = value.contiguous()
        save_file(changed, shard, {"format": "pt"})


def test_wrong_shape_of_one_expert(broken: Path) -> None:
    change_tensors(broken, "layers.1.mlp.experts.3.up_proj", lambda tensor: tensor[:-1])
    refuses(broken, CheckpointError, "experts.3.up_proj", "[15, 32]")


def test_wrong_shape_of_every_expert(broken: Path) -> None:
    change_tensors(broken, "layers.1.mlp.experts.", lambda tensor: tensor[:-1])
    refuses(broken, CheckpointError, "layers.1.mlp.experts.0", "wrong shape")


def test_wrong_shape_of_a_router(broken: Path) -> None:
    change_tensors(broken, "layers.2.mlp.gate", lambda tensor: tensor[:-1])
    refuses(broken, CheckpointError, "layers.2.mlp.gate.weight", "[7, 32]", "[8, 32]")


def test_wrong_shape_outside_the_experts(broken: Path) -> None:
    change_tensors(broken, "layers.0.self_attn.q_proj", lambda tensor: tensor[:, :-1])
    refuses(broken, CheckpointError, "layers.0.self_attn.q_proj.weight", "[32, 31]")


def test_index_names_a_tensor_its_shard_lacks(broken: Path) -> None:
    change_tensors(broken, "layers.1.mlp.experts.3.up_proj", lambda tensor: None)
    refuses(broken, CheckpointError, "layers.1.mlp.experts.3.up_proj", "does not hold")


def test_expert_missing_from_a_checkpoint_without_index(good: Path, tmp_path: Path) -> None:
    tensors = {
        name: value for shard in good.glob("*.safetensors") for name, value in load_file(shard).items()
    }
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(good / "config.json", tmp_path)
    refuses(tmp_path, CheckpointError, "one of 8 experts", "one of 7")


def test_layer_missing(good: Path, tmp_path: Path) -> None:
    tensors = {
        name: value for shard in good.glob("*.safetensors") for name, value in load_file(shard).items()
    }
    kept = {name: value for name, value in tensors.items() if "layers.2." not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(good / "config.json", tmp_path)
    refuses(tmp_path, CheckpointError, "model.layers.2.", "config.json")


def test_number_of_experts_is_not_the_configs(broken: Path) -> None:
    edit_config(broken, num_experts=6, num_local_experts=6)
    refuses(broken, CheckpointError, "8 experts", "6")


def test_index_pointing_out_of_the_directory(broken: Path) -> None:
    file = broken / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    file.write_text(json.dumps(index))
    refuses(broken, CheckpointError, "../elsewhere.safetensors")


def test_no_weights(good: Path, tmp_path: Path) -> None:
    shutil.copy(good / "config.json", tmp_path)
    refuses(tmp_path, CheckpointError, "no weights")


def test_pickle(good: Path, tmp_path: Path) -> None:
    shutil.copy(good / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refuses(tmp_path, UnsupportedModelError, "pytorch_model.bin", "safetensors")
    refuses(tmp_path / "pytorch_model.bin", UnsupportedModelError, "pickle")


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    refuses(tmp_path, UnsupportedModelError, "GGUF", "safetensors")
    refuses(tmp_path / "model.Q4_K_M.gguf", UnsupportedModelError, "GGUF")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("gptq", "GPTQ"),
        ("awq", "AWQ"),
        ("bitsandbytes", "bitsandbytes"),
        ("compressed-tensors", "compressed-tensors"),
        ("hqq", "HQQ"),
        ("something_new", "something_new"),
    ],
)
def test_other_quantisations_are_named(broken: Path, method: str, name: str) -> None:
    edit_config(broken, quantization_config={"quant_method": method})
    refuses(broken, UnsupportedModelError, f"quantised with {name},", "original checkpoint")


def test_packed_weights_that_the_config_does_not_mention(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[0]
    save_file(
        {
            **load_file(shard),
            "model.layers.0.mlp.experts.0.up_proj.qweight": torch.zeros(2, dtype=torch.int32),
        },
        shard,
        {"format": "pt"},
    )
    refuses(broken, UnsupportedModelError, "GPTQ or AWQ")


def test_broken_config(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    refuses(broken, CheckpointError, "config.json")


def test_config_that_no_model_fits(broken: Path) -> None:
    edit_config(broken, hidden_size=-32)
    refuses(broken, CheckpointError, "config.json")
    edit_config(broken, hidden_size="wide")
    refuses(broken, CheckpointError, "config.json", "hidden_size")


def test_unknown_model_type_gets_the_nearest(broken: Path) -> None:
    edit_config(broken, model_type="qwen3_mo")
    refuses(broken, UnsupportedModelError, "'qwen3_mo'", "qwen3_moe")


def test_custom_code_is_not_run(broken: Path) -> None:
    edit_config(broken, model_type="my_own", auto_map={"AutoConfig": "evil.Config"})
    (broken / "evil.py").write_text("raise SystemExit('ran')")
    refuses(broken, UnsupportedModelError, "my_own", "never run")


def test_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    refuses(tmp_path, UnsupportedModelError, "dense", "'llama'")
    with pytest.raises(UnsupportedModelError, match="dense"):
        open_model(model)


def llama4() -> Any:
    return Llama4TextConfig(
        hidden_size=16,
        intermediate_size=8,
        intermediate_size_mlp=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=16,
        num_local_experts=4,
    )


def dbrx() -> Any:
    return DbrxConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=16, max_seq_len=16)


@pytest.mark.parametrize(
    ("name", "config"),
    [("llama4_text", llama4), ("dbrx", dbrx), ("switch_transformers", None), ("doge", None)],
)
def test_families_outside_the_contract_are_named(name: str, config: Any, tmp_path: Path) -> None:
    (config() if config is not None else AutoConfig.for_model(name)).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    refuses(tmp_path, UnsupportedModelError, name, "not supported", "docs/families.md")


def test_nan_in_an_expert_or_router(broken: Path) -> None:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0, 0] = torch.nan
        return tensor

    change_tensors(broken, "layers.1.mlp.experts.3.up_proj", poison)
    change_tensors(broken, "layers.2.mlp.gate", poison)
    view = open_model(broken)
    view.layers[0].check_finite()
    view.layers[1].check_finite(experts=[0, 1, 2])
    with pytest.raises(
        CheckpointError, match=r"up of expert 3 of model\.layers\.1\.mlp\.experts holds 1 value"
    ):
        view.layers[1].check_finite()
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.gate\.weight"):
        view.layers[2].check_finite()


def test_names_that_are_not_there(broken: Path) -> None:
    view = open_model(broken)
    with pytest.raises(LookupError, match=r"model\.norm\.weight"):
        view.tensor("model.norm.weigh")
    with pytest.raises(LookupError):
        view.parameter("model.none")
    with pytest.raises(UserError, match="no expert 8"):
        view.layers[0].expert(8)
    with pytest.raises(UserError, match="layers with experts are 0, 1, 2"):
        view.layer(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_experts_per_tok": 0},
            "would choose 0 of the 8 experts of layer 1; config.json must name",
        ),
        ({"num_experts_per_tok": 9}, "would choose 9 of the 8 experts of layer 1"),
        ({"num_experts_per_tok": 5}, "would choose 5 experts of layer 1, but 2 of its 4 groups hold 4"),
        ({"topk_group": 5}, "5 of 4 groups would be chosen"),
        ({"n_group": 3}, "2 of 3 groups would be chosen of the 8 experts"),
    ],
)
def test_choices_that_experts_do_not_allow_are_refused(
    changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, n_group=4,
        topk_group=2, num_experts_per_tok=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    assert open_model(tmp_path).layers[0].top_k == 4
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        assert open_model(tmp_path).layers
