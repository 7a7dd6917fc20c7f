"""Block-scaled FP8 and MXFP4 checkpoints, decoded one expert at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mixtura.checkpoints.view import open_model
from mixtura.checkpoints.viewing.formats import decode_fp8, decode_mxfp4, fp8_blocks
from mixtura.checkpoints.viewing.quantization import fp8_block
from mixtura.errors import CheckpointError

BLOCK = 128


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 values and one scale per block of 128 x 128, by a loop over blocks."""
    rows, columns = weight.shape
    scale = torch.zeros(-(-rows // BLOCK), -(-columns // BLOCK))
    codes = torch.zeros_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            tile = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = weight[tile].abs().max().clamp(min=1e-8) / 448
            codes[tile] = weight[tile] / scale[i, j]
    return codes.to(torch.float8_e4m3fn), scale


def by_loop(codes: Tensor, scale: Tensor) -> Tensor:
    """Each value times the scale of its block, found by the value's place."""
    rows, columns = (torch.arange(size) // BLOCK for size in codes.shape)
    return torch.stack([row * scale[i, columns] for row, i in zip(codes.float(), rows, strict=True)])


@pytest.mark.parametrize("shape", [(256, 128), (200, 136), (128, 300), (5, 7)])
def test_fp8_blocks(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scale = to_fp8(weight)
    decoded = decode_fp8(codes, scale, torch.float32, (BLOCK, BLOCK))
    assert torch.equal(decoded, by_loop(codes, scale))
    assert (decoded - weight).abs().max() < 0.07 * weight.abs().max()


def test_fp8_is_decoded_as_transformers_does() -> None:
    codes, scale = to_fp8(torch.randn(256, 384, generator=torch.Generator().manual_seed(0)))
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    assert torch.equal(decode_fp8(codes, scale, torch.bfloat16, (BLOCK, BLOCK)), theirs)
    assert torch.equal(decode_fp8(codes, scale, torch.bfloat16), theirs)


def test_fp8_with_one_scale_or_one_per_matrix() -> None:
    codes = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    assert torch.equal(decode_fp8(codes, torch.tensor(0.5), torch.float32), codes.float() * 0.5)
    scales = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    assert torch.equal(decode_fp8(codes, scales, torch.float32), codes.float() * scales)


def test_fp8_scales_stored_as_exponents() -> None:
    codes = torch.ones(2, 4).to(torch.float8_e4m3fn)
    scales = torch.tensor([[127, 129]], dtype=torch.uint8)
    assert decode_fp8(codes, scales, torch.float32).tolist() == [[1.0, 1.0, 4.0, 4.0]] * 2


def test_fp8_blocks_that_no_config_states() -> None:
    # The last block is cut off: 128 and 32 rows, not 80 and 80.
    codes, scale = to_fp8(torch.randn(160, 300, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(decode_fp8(codes, scale, torch.float32), by_loop(codes, scale))


@pytest.mark.parametrize(
    ("shape", "scale", "stated", "blocks"),
    [
        ((160, 160), (2, 2), None, (128, 128)),
        ((160, 160), (3, 3), (64, 64), (64, 64)),
        ((160, 160), (160, 5), (128, 128), (1, 32)),
        ((6, 160, 96), (6, 2, 1), None, (128, 128)),
        ((6, 160, 96), (6, 1, 1), None, (160, 128)),
        ((160, 96), (1,), None, (160, 96)),
        ((160, 160), (2, 2), (64, 64), None),
        ((160, 160), (3, 3), None, None),
        ((160, 160), (160,), None, None),
        ((6, 160, 160), (6, 160), None, None),
    ],
)
def test_lengths_of_fp8_blocks(
    shape: tuple[int, ...],
    scale: tuple[int, ...],
    stated: tuple[int, int] | None,
    blocks: tuple[int, int] | None,
) -> None:
    assert fp8_blocks(shape, scale, stated) == blocks


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A DeepSeek-V3-shaped checkpoint with FP8 experts, and its decoded tensors by stored name."""
    config = DeepseekV3Config(
        vocab_size=32,
        hidden_size=160,
        intermediate_size=64,
        moe_intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("fp8")
    model.save_pretrained(path, save_original_format=True)
    view = open_model(path)
    stored: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for name in view.tensor_names:
        tensor = view.tensor(name)
        if "proj" in name and tensor.ndim == 2:
            stored[name], stored[f"{name}_scale_inv"] = to_fp8(tensor.float())
            decoded[name] = by_loop(stored[name], stored[f"{name}_scale_inv"]).to(torch.bfloat16)
        else:
            stored[name] = tensor
    # The released checkpoint also holds a layer for predicting several tokens, which is not loaded.
    stored["model.layers.2.mlp.experts.0.up_proj.weight"] = torch.zeros(136, 160)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
    (path / "config.json").write_text(json.dumps(raw))
    return path, decoded


def test_fp8_checkpoint(fp8: tuple[Path, dict[str, Tensor]]) -> None:
    path, decoded = fp8
    view = open_model(path)
    assert view.stored_dtype == "fp8"
    assert view.unused_names == ("model.layers.2.mlp.experts.0.up_proj.weight",)
    (layer,) = view.layers
    assert layer.index == 1
    for number in range(4):
        prefix = f"model.layers.1.mlp.experts.{number}."
        expert = layer.expert(number)
        assert expert.gate is not None
        assert torch.equal(expert.gate, decoded[f"{prefix}gate_proj.weight"])
        assert torch.equal(expert.up, decoded[f"{prefix}up_proj.weight"])
        assert torch.equal(expert.down, decoded[f"{prefix}down_proj.weight"])
        names = layer.expert_tensor_names(number)
        assert len(names) == 6
        assert all(name.startswith(prefix) for name in names)
    # 3 matrices of 136 x 160 bytes with 2 x 2 scales of 4 bytes each
    assert layer.expert_num_bytes == 3 * (136 * 160 + 16)
    assert torch.equal(layer.tensor(layer.shared_experts[0]), decoded[layer.shared_experts[0]])


@pytest.mark.parametrize("stated", [{}, {"weight_block_size": None}])
def test_fp8_checkpoint_without_a_stated_block_size(
    fp8: tuple[Path, dict[str, Tensor]], tmp_path: Path, stated: dict[str, Any]
) -> None:
    path, decoded = Path(shutil.copytree(fp8[0], tmp_path / "copy")), fp8[1]
    edit_config(path, quantization_config={"quant_method": "fp8", **stated})
    expert = open_model(path).layers[0].expert(2)
    assert torch.equal(expert.up, decoded["model.layers.1.mlp.experts.2.up_proj.weight"])
    assert torch.equal(expert.down, decoded["model.layers.1.mlp.experts.2.down_proj.weight"])


def test_fp8_blocks_that_fit_nothing_are_refused(fp8: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path = Path(shutil.copytree(fp8[0], tmp_path / "copy"))
    edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    with pytest.raises(CheckpointError, match=r"scales of shape \[2, 1\].*weight_block_size \[64, 64\]"):
        open_model(path)
    edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [128]})
    with pytest.raises(CheckpointError, match="two positive numbers"):
        open_model(path)


def test_a_block_size_that_a_part_of_the_config_states() -> None:
    raw = {"text_config": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}}}
    assert fp8_block(raw) == (64, 32)


def test_fp8_checkpoint_loses_scales_with_its_experts(fp8: tuple[Path, dict[str, Tensor]]) -> None:
    edits = open_model(fp8[0]).edits({1: [1]})
    prefix = "model.layers.1.mlp.experts"
    assert edits[f"{prefix}.1.up_proj.weight_scale_inv"].name is None
    assert edits[f"{prefix}.3.up_proj.weight_scale_inv"].name == f"{prefix}.2.up_proj.weight_scale_inv"
    assert edits[f"{prefix}.0.up_proj.weight_scale_inv"].name == f"{prefix}.0.up_proj.weight_scale_inv"


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    view = open_model(tmp_path)
    tensors = {name: view.tensor(name) for name in view.tensor_names}
    name = view.layers[0].expert_parameters[0]
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"FP8 without .*_scale_inv"):
        open_model(tmp_path)


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def random_mxfp4(rows: int, columns: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random codes ``[E, rows, columns / 32, 16]`` and exponents ``[E, rows, columns / 32]``."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator)
    scales = torch.randint(118, 126, (experts, rows, columns // 32), generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def mxfp4_value(blocks: Tensor, scales: Tensor, expert: int, row: int, column: int) -> float:
    """One weight, decoded from its bits."""
    block, place = divmod(column, 32)
    byte = int(blocks[expert, row, block, place // 2])
    code = byte >> 4 if place % 2 else byte & 15
    sign = -1.0 if code & 8 else 1.0
    return sign * FP4[code & 7] * 2.0 ** (int(scales[expert, row, block]) - 127)


def test_mxfp4_bits() -> None:
    blocks, scales = random_mxfp4(rows=6, columns=64, experts=2, seed=0)
    decoded = decode_mxfp4(blocks, scales, torch.float32)
    assert decoded.shape == (2, 64, 6)
    for expert in range(2):
        for row in range(6):
            for column in range(64):
                assert decoded[expert, column, row] == mxfp4_value(blocks, scales, expert, row, column)


def test_mxfp4_is_decoded_as_transformers_does() -> None:
    blocks, scales = random_mxfp4(rows=6, columns=64, experts=2, seed=1)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(decode_mxfp4(blocks, scales, torch.bfloat16), theirs)


def test_mxfp4_checkpoint(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = GptOssForCausalLM._from_config(config, dtype=torch.bfloat16)
    tensors = {name: value for name, value in model.state_dict().items() if not name.endswith("_proj")}
    packed: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
            packed[f"{prefix}.{name}"] = random_mxfp4(rows, columns, experts=4, seed=layer)
            for suffix, value in zip(("blocks", "scales"), packed[f"{prefix}.{name}"], strict=True):
                tensors[f"{prefix}.{name}_{suffix}"] = value
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.update(quantization_config={"quant_method": "mxfp4"}, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    view = open_model(tmp_path)
    assert view.stored_dtype == "mxfp4"
    assert view.unused_names == ()
    for layer_view in view.layers:
        for parameter in ("gate_up_proj", "down_proj"):
            whole = convert_moe_packed_tensors(
                *packed[f"{layer_view.name}.{parameter}"], dtype=torch.bfloat16
            )
            for expert in range(4):
                native = layer_view.native_expert(expert)
                assert torch.equal(native.up if parameter == "gate_up_proj" else native.down, whole[expert])
        # blocks and scales of both projections, and two bfloat16 biases
        assert layer_view.expert_num_bytes == 64 * (2 * 17) + 64 * 17 + 2 * (64 + 64)
        assert layer_view.expert_tensor_names(0) == ()
        assert f"{layer_view.name}.down_proj_scales" in layer_view.fused_tensor_names()
    edits = view.edits({0: [1], 1: [2]})
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    assert torch.equal(edits[name].apply(tensors[name]), tensors[name][[0, 1, 3]])
    assert edits["model.layers.0.mlp.router.bias"].apply(torch.arange(4)).tolist() == [0, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_widths(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("mixtral", dtype=dtype)
    model.save_pretrained(tmp_path, save_original_format=True)
    view = open_model(tmp_path)
    assert view.stored_dtype == str(dtype).removeprefix("torch.")
    assert view.layers[1].expert(5).up.dtype == dtype
    assert torch.equal(view.layers[1].expert(5).down, open_model(model).layers[1].expert(5).down)
