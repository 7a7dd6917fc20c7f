"""Which files weights are read from, what lies in their place, and formats that are not read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from tiny_scaled import raw_entries, write_safetensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.view import open_model
from mixtura.checkpoints.viewing.weight_files import INDEX_FILE, SINGLE_FILE
from mixtura.errors import CheckpointError, UnsupportedModelError
from mixtura.running.loading import load

EXPERT = "model.layers.0.mlp.experts.0.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint in one file, one matrix an expert."""
    path = tmp_path_factory.mktemp("model") / "saved"
    tiny_model("qwen3_moe").save_pretrained(path, save_original_format=True)
    return path


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(path: Path, **changes: Any) -> None:
    """Change config.json; None takes a field away."""
    file = path / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def write_shards(path: Path, shards: dict[str, dict[str, Tensor]], listed: dict[str, str]) -> None:
    for name, tensors in shards.items():
        (path / name).parent.mkdir(exist_ok=True)
        save_file(tensors, path / name, {"format": "pt"})
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


@pytest.mark.parametrize("keep_shards", [True, False])
def test_one_file_goes_before_an_index_as_in_transformers(path: Path, keep_shards: bool) -> None:
    tensors = load_file(path / SINGLE_FILE)
    old = {name: tensor * 2 for name, tensor in tensors.items()}
    write_shards(
        path,
        {"model-00001-of-00001.safetensors": old},
        dict.fromkeys(old, "model-00001-of-00001.safetensors"),
    )
    if not keep_shards:
        (path / "model-00001-of-00001.safetensors").unlink()
    view = open_model(path)
    assert view.files == (path / SINGLE_FILE,)
    assert torch.equal(view.tensor(EXPERT), tensors[EXPERT])
    theirs = AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight
    assert torch.equal(load(path).get_input_embeddings().weight, theirs)


def test_other_files_beside_the_weights_are_not_read(path: Path) -> None:
    tensors = load_file(path / SINGLE_FILE)
    for other in ("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"):
        save_file({name: tensor * 3 for name, tensor in tensors.items()}, path / other)
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert torch.equal(open_model(path).tensor(EXPERT), tensors[EXPERT])


def test_a_config_may_name_the_file_of_its_weights(path: Path) -> None:
    tensors = load_file(path / SINGLE_FILE)
    own = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(own, path / "own.safetensors", {"format": "pt"})
    edit_config(path, transformers_weights="own.safetensors")
    assert torch.equal(open_model(path).tensor(EXPERT), own[EXPERT])
    theirs = AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight
    assert torch.equal(load(path).get_input_embeddings().weight, theirs)
    edit_config(path, transformers_weights="../own.safetensors")
    with pytest.raises(CheckpointError, match=r"names '\.\./own\.safetensors' under transformers_weights"):
        open_model(path)


def test_shards_may_lie_in_a_folder(path: Path) -> None:
    tensors = load_file(path / SINGLE_FILE)
    (path / SINGLE_FILE).unlink()
    write_shards(path, {"parts/one.safetensors": tensors}, dict.fromkeys(tensors, "parts/one.safetensors"))
    assert torch.equal(open_model(path).tensor(EXPERT), tensors[EXPERT])


@pytest.mark.parametrize("stale", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_the_index_decides_between_copies_of_a_tensor(path: Path, stale: str) -> None:
    tensors = load_file(path / SINGLE_FILE)
    (path / SINGLE_FILE).unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    fresh = second if stale == first else first
    listed = {name: fresh if ".experts." in name else stale for name in tensors}
    shards = {
        fresh: {name: tensor for name, tensor in tensors.items() if listed[name] == fresh},
        stale: {name: tensor if listed[name] == stale else tensor * 0 for name, tensor in tensors.items()},
    }
    write_shards(path, shards, listed)
    view = open_model(path)
    assert all(torch.equal(view.tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("model.fp16.safetensors",), "model.fp16.safetensors only, .*variant"),
        (("consolidated.safetensors",), "consolidated.safetensors only, .*another library's format"),
        (("model-00001-of-00002.safetensors",), f"no {INDEX_FILE}"),
        (("adapter_model.safetensors",), "no weights"),
    ],
)
def test_what_is_there_instead_of_weights_is_named(path: Path, names: tuple[str, ...], words: str) -> None:
    for name in names:
        shutil.copy(path / SINGLE_FILE, path / name)
    (path / SINGLE_FILE).unlink()
    with pytest.raises((CheckpointError, UnsupportedModelError), match=words):
        open_model(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n <HTML>please log in</HTML>", "web page"),
        (b"", "it is empty"),
        (b"1234567", "ends after 7 bytes"),
        (
            (5000).to_bytes(8, "little") + b'{"a": ',
            "cut off within its header, after 14 of at least 5008 bytes",
        ),
        ((6).to_bytes(8, "little") + b'{"a": ', "header is not valid JSON"),
        (b"\x80\x02}q\x00." + b"x" * 40, "is a pickle"),
        (b"PK\x03\x04" + b"x" * 40, "is a pickle"),
        (b"GGUF" + b"x" * 40, "is a GGUF file"),
        (b"x" * 600, "is not a safetensors file"),
    ],
)
def test_what_lies_in_the_place_of_weights_is_named(path: Path, content: bytes, words: str) -> None:
    (path / SINGLE_FILE).write_bytes(content)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=words):
        open_model(path)


def test_what_lies_in_the_place_of_a_config_is_named(path: Path) -> None:
    (path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"config\.json is a Git LFS pointer"):
        open_model(path)


def test_the_directory_to_give_instead_is_named(path: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123456"
    snapshot.parent.mkdir(parents=True)
    shutil.move(path, snapshot)
    with pytest.raises(CheckpointError, match=f"give {snapshot}"):
        open_model(tmp_path / "models--me--tiny")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_is_that_of_the_weights_where_the_config_names_none(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_model("qwen3_moe", dtype=dtype).save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=None, torch_dtype=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ours = load(tmp_path)
    assert ours.dtype == theirs.dtype == dtype
    assert open_model(tmp_path).config.dtype == dtype


def test_a_mixed_checkpoint_takes_the_dtype_that_transformers_takes(path: Path) -> None:
    edit_config(path, dtype=None)
    tensors = load_file(path / SINGLE_FILE)
    (path / SINGLE_FILE).unlink()
    halves = {name: tensor.half() if ".layers.1." in name else tensor for name, tensor in tensors.items()}
    first = {name: tensor for name, tensor in halves.items() if ".layers.1." in name}
    rest = {name: tensor for name, tensor in halves.items() if ".layers.1." not in name}
    listed = {**dict.fromkeys(first, "a.safetensors"), **dict.fromkeys(rest, "b.safetensors")}
    write_shards(path, {"a.safetensors": first, "b.safetensors": rest}, listed)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert load(path).dtype == theirs.dtype == torch.float16
    index = json.loads((path / INDEX_FILE).read_text())
    (path / INDEX_FILE).write_text(json.dumps({**index, "metadata": {"dtype": "bfloat16"}}))
    assert load(path).dtype == torch.bfloat16


def as_nvfp4(tensor: Tensor) -> dict[str, Tensor]:
    rows, cols = tensor.shape
    return {
        "": torch.zeros(rows, cols // 2, dtype=torch.uint8),
        "_scale": torch.ones(rows, cols // 16).to(torch.float8_e4m3fn),
        "_scale_2": torch.ones(()),
    }


def as_fp4(tensor: Tensor) -> dict[str, Tensor]:
    rows, cols = tensor.shape
    return {
        "": torch.zeros(rows, cols // 2, dtype=torch.int8),
        "_scale_inv": torch.ones(rows, 1).to(torch.float8_e8m0fnu),
    }


@pytest.mark.parametrize(
    ("pack", "words"),
    [
        (as_nvfp4, "stored as NVFP4"),
        (as_fp4, "stored as FP4"),
        (lambda tensor: {"": tensor.to(torch.int8)}, "stored as int8 without scales"),
        (lambda tensor: {"": tensor.to(torch.int8), "_scale": torch.ones(())}, "stored as int8 with scales"),
    ],
)
def test_formats_that_are_not_read_are_named_and_no_harm_where_nothing_needs_them(
    path: Path, pack: Any, words: str
) -> None:
    tensors = load_file(path / SINGLE_FILE)
    beyond = {
        f"{name.replace('layers.0.', 'layers.9.')}{end}": part
        for name, tensor in tensors.items()
        if "layers.0.mlp.experts" in name
        for end, part in pack(tensor).items()
    }
    save_file({**tensors, **beyond}, path / SINGLE_FILE, {"format": "pt"})
    assert torch.equal(open_model(path).layers[0].expert(0).down, tensors[EXPERT])
    packed = {
        f"{name}{end}": part
        for name, tensor in tensors.items()
        for end, part in (pack(tensor) if ".experts." in name else {"": tensor}).items()
    }
    save_file(packed, path / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=f"{words}.*use the original checkpoint"):
        open_model(path)


def test_the_name_that_a_checkpoint_gives_its_format_is_said(path: Path) -> None:
    tensors = load_file(path / SINGLE_FILE)
    packed = {
        f"{name}{end}": part
        for name, tensor in tensors.items()
        for end, part in (as_fp4(tensor) if ".experts." in name else {"": tensor}).items()
    }
    save_file(packed, path / SINGLE_FILE, {"format": "pt"})
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "w4a8_mxfp4_fp8"}}))
    with pytest.raises(UnsupportedModelError, match="stored as W4A8_MXFP4_FP8,"):
        open_model(path)
    edit_config(
        path, quantization_config={"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    )
    with pytest.raises(UnsupportedModelError, match=r"compressed-tensors \(nvfp4-pack-quantized\)"):
        open_model(path)
    edit_config(path, quantization_config={"quant_algo": "NVFP4", "producer": {"name": "modelopt"}})
    with pytest.raises(UnsupportedModelError, match=r"ModelOpt \(NVFP4\)"):
        open_model(path)


def test_a_tensor_of_an_unknown_type_matters_only_where_it_is_needed(path: Path) -> None:
    entries = raw_entries(load_file(path / SINGLE_FILE))
    write_safetensors(path / SINGLE_FILE, {**entries, "extra": ("F4", [4, 8], bytes(16))})
    view = open_model(path)
    assert view.unused_names == ("extra",)
    with pytest.raises(UnsupportedModelError, match="extra has the type F4"):
        view.tensor("extra")
    shape = entries[EXPERT][1]
    write_safetensors(path / SINGLE_FILE, {**entries, EXPERT: ("F4", shape, bytes(shape[0] * shape[1] // 2))})
    with pytest.raises(UnsupportedModelError, match=f"{EXPERT} is stored as F4"):
        open_model(path)


def test_packed_names_of_layers_that_the_model_has_not_are_no_harm(path: Path) -> None:
    tensors = load_file(path / SINGLE_FILE)
    other = {"model.layers.9.mlp.experts.0.up_proj.qweight": torch.zeros(2, dtype=torch.int32)}
    save_file({**tensors, **other}, path / SINGLE_FILE, {"format": "pt"})
    assert open_model(path).unused_names == tuple(other)


def test_a_parameter_that_is_stored_under_two_names_is_named(path: Path) -> None:
    tensors = load_file(path / SINGLE_FILE)
    embedding = "model.embed_tokens.weight"
    twice = {**tensors, "embed_tokens.weight": tensors[embedding] + 1}
    save_file(twice, path / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"{embedding} twice, as embed_tokens\.weight and as {embedding}"
    ):
        open_model(path)


def test_weights_in_a_folder_have_a_digest(path: Path) -> None:
    tensors = load_file(path / SINGLE_FILE)
    (path / SINGLE_FILE).unlink()
    write_shards(path, {"parts/one.safetensors": tensors}, dict.fromkeys(tensors, "parts/one.safetensors"))
    before = checkpoint_digest(path)
    save_file({**tensors, EXPERT: tensors[EXPERT] + 1}, path / "parts" / "one.safetensors", {"format": "pt"})
    assert checkpoint_digest(path) != before


def test_a_generation_config_that_cannot_be_read_is_named(path: Path) -> None:
    (path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*generation_config\.json"):
        load(path)
