"""What applying a plan refuses, and that it leaves nothing behind when it does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from applying_sources import MakeSource, folder_digest
from safetensors.torch import load_file, save_file

from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.view import open_model
from mixtura.errors import CheckpointError, OutputError, SettingError, UnknownNameError, UserError
from mixtura.types import Action, Drop, Plan, Quantize

RTN = "round_to_nearest"


def apply(source: Path, out: Path, *actions: Action) -> Path:
    return apply_plan(Plan(checkpoint_digest(source), actions), source, out, progress=False)


def damaged_copy(source: Path, folder: Path, name: str, place: int, value: float) -> Path:
    """A copy of a checkpoint in one file with one value of one tensor changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[place] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "name", "value", "said"),
    [
        ("qwen3_moe", "model.layers.1.mlp.gate.weight", float("inf"), "router of layer 1"),
        ("qwen3_moe", "model.layers.1.mlp.experts.6.down_proj.weight", float("nan"), "expert 6 of layer 1"),
        ("gpt_oss", "model.layers.2.mlp.experts.gate_up_proj", float("nan"), "expert 3 of layer 2"),
        ("gpt_oss", "model.layers.2.mlp.experts.down_proj_bias", -float("inf"), "expert 3 of layer 2"),
    ],
)
@pytest.mark.parametrize("way", ["drop", "quantize", "copy"])
def test_nan_and_infinity_are_found_and_named(
    way: str, family: str, name: str, value: float, said: str, make_source: MakeSource, tmp_path: Path
) -> None:
    row = load_file(make_source(family) / "model.safetensors")[name][0].numel()
    place = 3 * row + 5
    source = damaged_copy(make_source(family), tmp_path / "source", name, place, value)
    actions: dict[str, list[Action]] = {
        "drop": [Drop(layer, (0, 1)) for layer in range(3)],
        "quantize": [Quantize(layer, e, RTN, {"bits": 4}) for layer in range(3) for e in range(8)],
        "copy": [],
    }
    with pytest.raises(CheckpointError, match=said):
        apply(source, tmp_path / "out", *actions[way])
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_an_expert_that_is_dropped_may_be_damaged(make_source: MakeSource, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.6.down_proj.weight"
    source = damaged_copy(make_source("qwen3_moe"), tmp_path / "source", name, 0, float("nan"))
    out = apply(source, tmp_path / "out", *(Drop(layer, (6,)) for layer in range(3)))
    assert not any(t.isnan().any() for t in load_file(out / "model.safetensors").values())


def test_an_infinite_correction_bias_is_no_damage(make_source: MakeSource, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    source = damaged_copy(make_source("deepseek_v3"), tmp_path / "source", name, 0, -float("inf"))
    assert apply(source, tmp_path / "out").is_dir()


def test_nan_in_scales_is_found(fp8_source: Path, mxfp4_source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    fp8 = damaged_copy(fp8_source, tmp_path / "fp8", name, 0, float("nan"))
    with pytest.raises(CheckpointError, match="expert 2 of layer 1"):
        apply(fp8, tmp_path / "out")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    mxfp4 = damaged_copy(mxfp4_source, tmp_path / "mxfp4", name, 0, 255)
    for actions in ((), (Quantize(1, 3, RTN, {"bits": 4}),)):
        with pytest.raises(CheckpointError, match="expert 0 of layer 1"):
            apply(mxfp4, tmp_path / "out", *actions)


@pytest.mark.parametrize(
    ("family", "actions", "error", "said"),
    [
        ("qwen3_moe", [Drop(9, (0,))], UserError, "layer 9 has no experts"),
        ("qwen3_moe", [Drop(1, (8,))], UserError, "expert 8 of layer 1, which has 0 to 7"),
        ("qwen3_moe", [Quantize(1, -1, RTN, {})], UserError, "expert -1 of layer 1"),
        (
            "qwen3_moe",
            [Quantize(1, 0, "round_to_neares", {})],
            UnknownNameError,
            "did you mean 'round_to_nearest'",
        ),
        ("qwen3_moe", [Quantize(1, 0, RTN, {"bits": 3})], SettingError, "bits of RoundToNearest"),
        ("qwen3_moe", [Quantize(1, 0, RTN, {"bit": 4})], SettingError, "no setting 'bit'"),
        (
            "qwen3_moe",
            [Quantize(1, 0, RTN, {}), Drop(1, (0,))],
            UserError,
            "both drops and quantizes expert 0",
        ),
        ("qwen3_moe", [Drop(1, tuple(range(7)))], UserError, "chooses 2 for each token; drop at most 6"),
        ("deepseek_v3", [Drop(1, (0, 1))], UserError, "drop the same number in each group"),
        ("deepseek_v3", [Drop(1, (0, 1, 2, 4, 5, 6))], UserError, "drop at most 2 in each group"),
    ],
)
def test_plans_that_do_not_fit_are_refused(
    family: str,
    actions: list[Action],
    error: type[UserError],
    said: str,
    make_source: MakeSource,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=said):
        apply(make_source(family), tmp_path / "out", *actions)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_are_the_same_on_disk_are_treated_alike(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("diffusion_gemma")
    with pytest.raises(UserError, match="layers 0 and 3 share their experts, so the same"):
        apply(source, tmp_path / "out", Drop(0, (1,)))
    with pytest.raises(UserError, match="are then neither merged nor quantized"):
        apply(source, tmp_path / "out", Quantize(0, 1, RTN, {}), Quantize(3, 1, RTN, {}))
    assert apply(source, tmp_path / "out", *(Drop(layer, (1, 5)) for layer in range(6))).is_dir()


def test_a_plan_for_another_checkpoint_is_refused(make_source: MakeSource, tmp_path: Path) -> None:
    plan = Plan(checkpoint_digest(make_source("mixtral")))
    with pytest.raises(UserError, match="the plan was made for a checkpoint with digest sha256"):
        apply_plan(plan, make_source("qwen3_moe"), tmp_path / "out", progress=False)


def test_output_directories_that_cannot_be_are_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("qwen3_moe")
    before = folder_digest(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, said in (
        (tmp_path / "full", "exists and is never overwritten"),
        (tmp_path / "file", "exists and is never overwritten"),
        (tmp_path / "file" / "out", "cannot be written|failed"),
        (source, "is the source or lies inside it"),
        (source / "smaller", "is the source or lies inside it"),
        (Path("/proc/out"), "cannot be written|failed"),
    ):
        with pytest.raises(OutputError, match=said):
            apply(source, out)
    assert folder_digest(source) == before
    assert (tmp_path / "full" / "note").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert apply(source, tmp_path / "empty") == tmp_path / "empty"


def test_a_partial_directory_of_someone_else_is_left_alone(make_source: MakeSource, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds thesis\.tex, which mixtura did not write"):
        apply(make_source("qwen3_moe"), tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "years of work"


def test_truncated_sources_are_refused_before_anything_is_written(
    make_source: MakeSource, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(make_source("qwen3_moe"), source)
    digest = checkpoint_digest(source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        apply_plan(Plan(digest), source, tmp_path / "out", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_checkpoint_of_the_mixtura_format_is_no_source(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("qwen3_moe")
    layer = open_model(source).layers[0].index
    out = apply(source, tmp_path / "out", Quantize(layer, 0, RTN, {"bits": 8}))
    with pytest.raises(UserError, match="already in the mixtura format; apply one plan"):
        apply(out, tmp_path / "again")


def test_settings_out_of_range_are_refused(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("qwen3_moe")
    plan = Plan(checkpoint_digest(source))
    for settings in ({"shard_bytes": 0}, {"workers": 0}):
        with pytest.raises(SettingError, match="must be at least 1"):
            apply_plan(plan, source, tmp_path / "out", progress=False, **settings)  # type: ignore[arg-type]


def test_digest_tells_checkpoints_apart(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("qwen3_moe")
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "README.md").write_text("another card")
    assert checkpoint_digest(copy) == checkpoint_digest(source)
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    assert checkpoint_digest(copy) != checkpoint_digest(source)
    with pytest.raises(CheckpointError, match="is not a model directory"):
        checkpoint_digest(tmp_path)
