"""Loading checkpoints to run them: as transformers would, and in the bits they are stored in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from tiny_checkpoints import tiny_tokenizer
from tiny_plans import save_packed, save_source, save_uneven, uneven_drops
from tiny_scaled import save_fp8, save_mxfp4
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

from mixtura import observe, register_backend
from mixtura.checkpoints.packed import PackedExpert
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.view import DiskView, PackedView, masked, open_model
from mixtura.data.tokens import TokenBatch
from mixtura.errors import CheckpointError, UnsupportedModelError
from mixtura.kernels import using
from mixtura.running.loading import load
from mixtura.running.stream import Streamed

register_backend()
FAMILIES = (
    "qwen3_moe",
    "gpt_oss",
    pytest.param("mixtral", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", marks=pytest.mark.slow),
)
IDS = torch.arange(3, 27)[None]


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    logits = model(input_ids=ids).logits
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize("family", [*FAMILIES, "gemma4", "jamba"])
def test_an_ordinary_checkpoint_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family)
    theirs = AutoModelForCausalLM.from_pretrained(source, experts_implementation="mixtura")
    ours = load(source)
    assert type(ours) is type(theirs)
    assert not ours.training
    with using("torch"):
        assert torch.equal(logits_of(ours), logits_of(theirs))
    state = dict(theirs.state_dict())
    assert {name: tensor.dtype for name, tensor in ours.state_dict().items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_are_exactly_their_decoded_selves(family: str, tmp_path: Path) -> None:
    source, packed = save_packed(tmp_path, family)
    model, view = load(packed), open_model(packed)
    assert isinstance(view, PackedView)
    decoded = load(source)
    for layer, target in zip(view.layers, open_model(decoded).layers, strict=True):
        for expert in range(layer.num_experts):
            target.set_expert(expert, layer.expert(expert))
    assert not torch.equal(logits_of(decoded), logits_of(load(source)))
    torch.testing.assert_close(logits_of(model), logits_of(decoded), rtol=1e-5, atol=1e-6)
    # The compiled kernels multiply what the stream decodes first: compare like with like.
    with using("torch"):
        assert torch.equal(logits_of(model), logits_of(Streamed(view).model))


def test_packed_experts_stay_packed(tmp_path: Path) -> None:
    source, packed = save_packed(tmp_path, "qwen3_moe")
    model = load(packed)
    assert not [name for name, _ in model.named_parameters() if "experts" in name]
    stores = [module.mixtura_store for module in model.modules() if hasattr(module, "mixtura_store")]
    stored = sum(
        entry.num_bytes for name, entry in open_checkpoint(packed).entries.items() if "experts" in name
    )
    dense = sum(p.nbytes for name, p in load(source).named_parameters() if "experts" in name)
    assert stored <= sum(store.num_bytes for store in stores) < stored + 64 * 8 * 12
    assert stored < dense / 2


@pytest.mark.parametrize(("save", "kind"), [(save_fp8, "fp8"), (save_mxfp4, "mxfp4")])
def test_scaled_formats_stay_in_their_bits(save: Any, kind: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    view = open_checkpoint(source)
    assert view.stored_dtype == kind
    model = load(source)
    for layer in view.layers:
        store = model.get_submodule(layer.name).mixtura_store
        assert {str(record.up.meta["stored"]) for record in store.records} == {kind}
        assert store.num_bytes < layer.expert_num_bytes * layer.num_experts * 1.5 + 8192
        for expert in range(layer.num_experts):
            read, decoded = layer.native_expert(expert), store.get(expert, torch.bfloat16)
            assert torch.equal(read.up, decoded.up)
            assert torch.equal(read.down, decoded.down)
    with using("torch"):
        assert torch.equal(logits_of(model), logits_of(Streamed(view).model))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gemma4"])
def test_layers_may_have_other_numbers_of_experts(family: str, tmp_path: Path) -> None:
    source, uneven = save_uneven(tmp_path, family)
    drops = uneven_drops(source)
    model = load(uneven)
    counts = {layer.index: layer.num_experts for layer in open_model(model).layers}
    assert counts == {layer.index: 8 - len(drops.get(layer.index, ())) for layer in open_model(source).layers}
    whole = load(source)
    with masked(whole, drops):
        torch.testing.assert_close(logits_of(model), logits_of(whole), rtol=1e-5, atol=1e-6)


def test_the_dtype_can_be_chosen(tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, "qwen3_moe")
    model = load(packed, dtype=torch.float64)
    assert model.dtype == torch.float64
    assert logits_of(model).dtype == torch.float64
    torch.testing.assert_close(logits_of(model).float(), logits_of(load(packed)), rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_what_transformers_keeps(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("deepseek_v3", dtype=torch.bfloat16).save_pretrained(source)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype="auto", experts_implementation="mixtura")
    ours = load(source)
    assert {str(t.dtype) for t in ours.state_dict().values()} == {"torch.bfloat16", "torch.float32"}
    with using("torch"):
        assert torch.equal(logits_of(ours), logits_of(theirs))


def test_tied_weights_are_loaded_once(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    loaded = load(tmp_path / "tied")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-5, atol=1e-6)


def test_tied_weights_that_differ_are_taken_apart(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    theirs = AutoModelForCausalLM.from_pretrained(source, experts_implementation="mixtura")
    loaded = load(source)
    assert loaded.get_input_embeddings().weight is not loaded.get_output_embeddings().weight
    with using("torch"):
        assert torch.equal(logits_of(loaded), logits_of(theirs))


def test_a_packed_model_runs_in_a_pipeline(tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, "mixtral")
    model, tokenizer = load(packed), tiny_tokenizer()
    assert isinstance(model, PreTrainedModel)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (made,) = generate("one two", max_new_tokens=4, do_sample=False)
    assert made["generated_text"].startswith("one two")


def test_a_packed_model_can_be_observed(tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, "qwen3_moe")
    ids = IDS.expand(2, -1).contiguous()
    tokens = TokenBatch(ids, torch.ones_like(ids), torch.zeros(2, dtype=torch.int64), ("all",))
    trace = observe(load(packed), tokens, progress=False)
    assert [int(layer.load.sum()) for layer in trace.layers] == [2 * 2 * IDS.shape[1]] * len(trace.layers)


def test_a_packed_model_refuses_to_be_saved(tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, "qwen3_moe")
    with pytest.raises(UnsupportedModelError, match="cannot be saved"):
        load(packed).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_transformers_refuses_a_packed_checkpoint_in_words(tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, "qwen3_moe")
    with pytest.raises(Exception, match=r"mixtura\.load"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_packed_layers_are_viewed_like_others(tmp_path: Path) -> None:
    source, packed = save_packed(tmp_path, "gpt_oss")
    view, original = open_model(packed), open_model(source)
    assert isinstance(view, PackedView)
    assert isinstance(original, DiskView)
    assert view.config.to_dict() == {**original.config.to_dict(), "_name_or_path": str(packed)}
    assert view.num_bytes < original.num_bytes
    for layer, first in zip(view.layers, original.layers, strict=True):
        assert (layer.shape, layer.top_k, layer.name) == (first.shape, first.top_k, first.name)
        assert torch.equal(layer.router_weight(), first.router_weight())
        for expert in range(layer.num_experts):
            found, given = layer.expert(expert), first.expert(expert)
            assert found.up.shape == given.up.shape
            # Experts 3 and 7 are stored as they were.
            assert torch.equal(found.up, given.up) == (expert % 4 == 3)
    packed_expert = view.layers[0].packed_expert(0)
    assert isinstance(packed_expert, PackedExpert)
    assert packed_expert.num_bytes < view.layers[0].packed_expert(3).num_bytes


def test_a_packed_checkpoint_without_a_tensor_is_named(tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, "qwen3_moe")
    shard = next(packed.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="truncated"):
        load(packed)
