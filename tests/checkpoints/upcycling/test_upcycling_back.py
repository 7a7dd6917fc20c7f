"""An MoE model back into a dense one: copies give the source again, others their average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_checkpoints import save_dense
from safetensors.torch import load_file
from tiny_checkpoints import run_mixtura, save_tiny
from transformers import AutoModelForCausalLM

import mixtura
from mixtura.checkpoints.dense.view import DenseView
from mixtura.errors import UnsupportedModelError, UserError


@pytest.mark.parametrize("family", ["mistral", "qwen3", "olmo2"])
def test_what_was_upcycled_by_copies_is_the_source_again(family: str, tmp_path: Path) -> None:
    config = {"sliding_window": 5} if family == "mistral" else {}
    source = save_dense(tmp_path / "dense", family, **config)
    moe, back = tmp_path / "moe", tmp_path / "back"
    mixtura.upcycle(source, moe, experts=4, measure=False)
    mixtura.condense(moe, back, shard_bytes=20_000, progress=False)
    assert DenseView(back).traits == DenseView(source).traits
    model, info = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    wanted = load_file(source / "model.safetensors")
    assert all(
        torch.equal(value, wanted[name]) for name, value in model.state_dict().items() if name in wanted
    )
    assert set(wanted) <= set(model.state_dict())


def test_experts_are_averaged_by_their_shares(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    moe, back = tmp_path / "moe", tmp_path / "back"
    mixtura.upcycle(source, moe, experts=2, settings={"redrawn": 0.5}, measure=False)
    mixtura.condense(moe, back, shares={0: [0.25, 0.75], 1: [1.0, 0.0]}, progress=False)
    before, after = load_file(moe / "model.safetensors"), load_file(back / "model.safetensors")
    for layer, shares in ((0, (0.25, 0.75)), (1, (1.0, 0.0))):
        for name, part in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            experts = f"model.layers.{layer}.block_sparse_moe.experts"
            one, two = (before[f"{experts}.{e}.{name}.weight"] for e in (0, 1))
            found = after[f"model.layers.{layer}.mlp.{part}.weight"]
            torch.testing.assert_close(found, shares[0] * one + shares[1] * two)
    with pytest.raises(UserError, match=r"shares of layer 0 must be 2 numbers.*got \(0\.5, 0\.6\)"):
        mixtura.condense(moe, tmp_path / "other", shares={0: [0.5, 0.6]})


def test_the_command(tmp_path: Path) -> None:
    source, moe = save_dense(tmp_path / "dense"), tmp_path / "moe"
    mixtura.upcycle(source, moe, experts=2, measure=False)
    done = run_mixtura(
        "condense", str(moe), "--shares", "load", "--tokens", "512", "--out", str(tmp_path / "b")
    )
    assert done.returncode == 0, done.stderr
    # Copies are the source whatever their shares, to rounding.
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "b/model.safetensors")
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())
    other = save_tiny(tmp_path / "shared", "qwen2_moe")
    refused = run_mixtura("condense", str(other), "--out", str(tmp_path / "c"))
    assert refused.returncode == 2
    assert "mixtral, qwen3_moe, flex_olmo can be made dense" in refused.stderr


def test_dense_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="is dense"):
        mixtura.condense(save_dense(tmp_path / "dense"), tmp_path / "out")
