"""What applying a plan writes: ordinary checkpoints, the mixtura format, and all that goes along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from applying_sources import MakeSource, folder_digest
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mixtura.checkpoints.apply import apply_plan, planned_num_bytes
from mixtura.checkpoints.contents import Contents, read_experts_file
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.packed import read_expert
from mixtura.checkpoints.view import DiskView, open_model
from mixtura.methods.quantizers.round_to_nearest import RoundToNearest
from mixtura.types import Action, Drop, Plan, Quantize

RTN = "round_to_nearest"
FAMILIES = (
    "qwen3_moe",
    pytest.param("mixtral", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", marks=pytest.mark.slow),
    "gpt_oss",
)


def plan_for(source: Path, *actions: Action) -> Plan:
    return Plan(checkpoint_digest(source), actions)


def drop_two(source: Path) -> Plan:
    """Two experts of eight from every layer, others in each; one of each group where there are groups."""
    actions = [
        Drop(layer.index, (layer.index % 4, 4 + (layer.index + 1) % 4)) for layer in open_model(source).layers
    ]
    return plan_for(source, *actions)


def load(folder: Path, **settings: object) -> nn.Module:
    """What plain transformers makes of a directory; nothing may be missing, too much or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert {name: found for name, found in info.items() if found} == {}
    assert isinstance(model, nn.Module)
    return model


def cut(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The state of a model without the entries of the experts that a plan drops."""
    state = dict(model.state_dict())
    gone = plan.dropped()
    for layer in open_model(model).layers:
        kept = [e for e in range(layer.num_experts) if e not in gone.get(layer.index, ())]
        axes = {**dict.fromkeys(layer.expert_parameters, 0), **layer.per_expert_tensors()}
        for name, axis in axes.items():
            state[name] = state[name].index_select(axis, torch.tensor(kept))
    return state


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000], ids=["one shard", "many shards"])
def test_even_drop_is_an_ordinary_checkpoint(
    family: str, shard_bytes: int, make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source(family, "60KB")
    before = folder_digest(source)
    plan = drop_two(source)
    out = apply_plan(plan, source, tmp_path / "out", shard_bytes=shard_bytes, progress=False)
    assert folder_digest(source) == before
    assert len(list(out.glob("*.safetensors"))) == (
        1 if shard_bytes == 10**9 else len(set(_index(out).values()))
    )
    assert not (out / "experts.json").exists()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert sum(t.nbytes for t in tensors_of(out).values()) == planned_num_bytes(plan, source)
    assert_same_state(load(out), cut(load(source), plan))
    # The result is a source like any other.
    again = apply_plan(plan_for(out), out, tmp_path / "again", progress=False)
    assert_same_state(load(again), cut(load(source), plan))


def _index(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def test_shards_follow_the_index_and_the_limit(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("qwen3_moe", "60KB")
    out = apply_plan(plan_for(source), source, tmp_path / "out", shard_bytes=40_000, progress=False)
    where = _index(out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        assert {name for name, shard in where.items() if shard == file.name} == set(tensors)
        assert sum(t.nbytes for t in tensors.values()) <= 40_000 or len(tensors) == 1
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    assert len(set(where.values())) > 5
    copied, original = tensors_of(out), tensors_of(source)
    assert set(copied) == set(original)
    assert all(torch.equal(copied[name], original[name]) for name in original)


def test_keeps_dtype_of_half_precision_sources(make_source: MakeSource, tmp_path: Path) -> None:
    source = tmp_path / "half"
    load(make_source("mixtral")).to(torch.bfloat16).save_pretrained(source)
    plan = drop_two(source)
    out = apply_plan(plan, source, tmp_path / "out", progress=False)
    assert {t.dtype for t in tensors_of(out).values()} == {torch.bfloat16}
    assert_same_state(load(out, dtype="auto"), cut(load(source, dtype="auto"), plan))


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_experts_are_read_back(family: str, make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(family)
    view = open_model(source)
    first, second = view.layers[0], view.layers[1]
    bits = {1: 8, 2: 4, 5: 2}
    actions = [Quantize(first.index, e, RTN, {"bits": b}) for e, b in bits.items()]
    plan = plan_for(source, *drop_of(view, (3, 7)), *actions)
    out = apply_plan(plan, source, tmp_path / "out", progress=False)
    layers = {layer.index: layer for layer in read_experts_file(out).layers}
    assert layers[second.index].experts is None
    packed = layers[first.index]
    assert packed.kept == (0, 1, 2, 4, 5, 6)
    contents = read_experts_file(out)
    assert Contents.from_json(contents.to_json()) == contents
    stored = tensors_of(out)
    assert sum(t.nbytes for t in stored.values()) == planned_num_bytes(plan, source)
    for number, expert in enumerate(packed.kept):
        native = first.native_expert(expert)
        got = read_expert(packed, number, stored.__getitem__).native(
            torch.float32, transposed=first.layout.transposed
        )
        for name in ("up", "down", "up_bias", "down_bias"):
            wanted, found = getattr(native, name), getattr(got, name)
            if wanted is not None and expert in bits and name in ("up", "down"):
                wanted = through(wanted, bits[expert], first.layout.transposed)
            assert (wanted is None and found is None) or torch.equal(wanted, found), (expert, name)


def drop_of(view: DiskView, experts: tuple[int, ...]) -> list[Drop]:
    return [Drop(layer.index, experts) for layer in view.layers]


def through(weight: Tensor, bits: int, transposed: bool) -> Tensor:
    """A matrix after encoding and decoding, in its own orientation."""
    turned = weight.T if transposed else weight
    quantizer = RoundToNearest(bits=bits)
    decoded = quantizer.decode(quantizer.encode(turned.contiguous()), torch.float32)
    return decoded.T if transposed else decoded


def test_mixtura_format_is_refused_in_words_by_plain_transformers(
    make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source("qwen3_moe")
    plan = plan_for(source, Quantize(open_model(source).layers[0].index, 0, RTN, {"bits": 8}))
    out = apply_plan(plan, source, tmp_path / "out", progress=False)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "mixtura", "version": 1}
    with pytest.raises(ValueError, match=r"load its directory with mixtura\.load"):
        AutoModelForCausalLM.from_pretrained(out)


def test_uneven_drop_is_of_the_mixtura_format(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("qwen3_moe")
    view = open_model(source)
    index = view.layers[1].index
    out = apply_plan(plan_for(source, Drop(index, (0, 5, 6))), source, tmp_path / "out", progress=False)
    config = json.loads((out / "config.json").read_text())
    assert AutoConfig.from_pretrained(out).num_experts == 8
    assert config["quantization_config"]["quant_method"] == "mixtura"
    assert config["mixtura"]["num_experts"][str(index)] == 5
    layers = {layer.index: layer for layer in read_experts_file(out).layers}
    assert layers[index].kept == (1, 2, 3, 4, 7)
    assert all(layer.experts is None for layer in layers.values())
    stored, original = tensors_of(out), tensors_of(source)
    prefix = f"model.layers.{index}.mlp"
    assert torch.equal(stored[f"{prefix}.gate.weight"], original[f"{prefix}.gate.weight"][[1, 2, 3, 4, 7]])
    assert torch.equal(
        stored[f"{prefix}.experts.4.up_proj.weight"], original[f"{prefix}.experts.7.up_proj.weight"]
    )
    assert f"{prefix}.experts.5.up_proj.weight" not in stored


@pytest.mark.parametrize("which", ["fp8_source", "mxfp4_source"])
def test_scaled_sources_stay_scaled_when_experts_are_dropped(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(which)
    plan = drop_two(source)
    out = apply_plan(plan, source, tmp_path / "out", progress=False)
    assert {t.dtype for t in tensors_of(out).values()} == {t.dtype for t in tensors_of(source).values()}
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] in which
    assert_same_state(load(out, dtype="auto"), cut(load(source, dtype="auto"), plan))


@pytest.mark.parametrize("which", ["fp8_source", "mxfp4_source"])
def test_scaled_experts_that_no_action_names_are_copied_as_stored(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(which)
    view = open_model(source)
    layer = view.layers[0]
    plan = plan_for(source, Quantize(layer.index, 3, RTN, {"bits": 2, "group_size": 16}))
    out = apply_plan(plan, source, tmp_path / "out", progress=False)
    stored = tensors_of(out)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["source"] == view.raw_config["quantization_config"]
    packed = next(record for record in read_experts_file(out).layers if record.index == layer.index)
    for expert in range(layer.num_experts):
        native = layer.native_expert(expert)
        read = read_expert(packed, expert, stored.__getitem__)
        got = read.native(native.up.dtype, transposed=layer.layout.transposed)
        if expert == 3:
            assert not torch.equal(got.up, native.up)
            assert read.num_bytes < layer.expert_num_bytes
        else:
            assert torch.equal(got.up, native.up)
            assert torch.equal(got.down, native.down)
            assert read.num_bytes == layer.expert_num_bytes
    other = view.layers[1]
    own = [*other.expert_tensor_names(0), *other.fused_tensor_names()]
    assert own
    assert all(torch.equal(_bits(stored[name]), _bits(view.tensor(name))) for name in own)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_small_files_go_along_and_pickles_do_not(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("qwen3_moe")
    plan = drop_two(source)
    out = apply_plan(
        plan, source, tmp_path / "smaller", progress=False, source_name="somebody/a-model@1234567"
    )
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "LICENSE",
        "NOTICE.txt",
        "README.md",
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "plan.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (out / "LICENSE").read_bytes() == (source / "LICENSE").read_bytes()
    assert Plan.from_json((out / "plan.json").read_text()) == plan
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    for said in (
        "license: apache-2.0",
        "base_model: somebody/a-model\n",
        "somebody/a-model@1234567",
        plan.source_digest,
        "| dropped | 6 |",
        'AutoModelForCausalLM.from_pretrained("smaller")',
    ):
        assert said in card
    assert "The source" not in card
    named = apply_plan(plan, source, tmp_path / "model", progress=False, name="chosen")
    assert "\n# chosen\n" in (named / "README.md").read_text()


def test_the_card_of_the_mixtura_format_counts_by_width(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("qwen3_moe")
    layers = [layer.index for layer in open_model(source).layers]
    actions = [Quantize(layers[0], e, RTN, {"bits": 4}) for e in range(5)]
    actions += [Quantize(layers[1], e, RTN, {"bits": 2}) for e in range(2)]
    out = apply_plan(plan_for(source, *actions), source, tmp_path / "out", progress=False)
    card = (out / "README.md").read_text()
    assert 'mixtura.load("out")' in card
    assert "| `round_to_nearest` (bits=4) | 5 |" in card
    assert "| `round_to_nearest` (bits=2) | 2 |" in card
    assert f"| kept as they were | {8 * len(layers) - 7} |" in card


def test_bytes_depend_neither_on_workers_nor_on_the_place(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("deepseek_v3", "60KB")
    index = open_model(source).layers[0].index
    plan = plan_for(source, *(Quantize(index, e, RTN, {"bits": 4}) for e in range(8)))
    settings = {"shard_bytes": 30_000, "progress": False}
    one = apply_plan(plan, source, tmp_path / "a" / "out", **settings)  # type: ignore[arg-type]
    two = apply_plan(plan, source, tmp_path / "b" / "out", workers=3, **settings)  # type: ignore[arg-type]
    assert folder_digest(one) == folder_digest(two)
