"""Experts cut finer compute what they did, as ordinary models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from modeling.tiny_models import some_ids, tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mixtura.cli import build_app
from mixtura.data import specimen
from mixtura.errors import SettingError, UnsupportedModelError
from mixtura.modeling.export import export
from mixtura.modeling.splitting import split


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("renormalize", [True, False])
def test_finer_experts_compute_what_they_did(tmp_path: Path, parts: int, renormalize: bool) -> None:
    router = {"name": "top_k", "top_k": 2, "renormalize": renormalize}
    model = tiny_model({"router": router}, layers=[None, "dense"], tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made, ids = split(model, parts), some_ids()
    torch.testing.assert_close(made(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    shape, chosen = made.model.blocks[0].experts.shape, made.model.blocks[0].router.top_k
    assert (shape.num_experts, shape.d_expert, chosen) == (4 * parts, 16 // parts, 2 * parts)
    grown = sum(one.numel() for one in made.parameters()) - sum(one.numel() for one in model.parameters())
    assert grown == 4 * (parts - 1) * 32  # rows of the router, and nothing else
    assert export(made, tmp_path / "out") == "qwen3_moe"
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(ordinary(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(SettingError, match="parts must divide the experts' width, 16, got 3"):
        split(tiny_model(), 3)
    with pytest.raises(UnsupportedModelError, match="under the router Switch cannot be split"):
        split(tiny_model({"router": "switch"}), 2)


def test_the_command_writes_a_model_of_the_same_family(tmp_path: Path) -> None:
    arguments = ["split", str(specimen.path()), "--parts", "2", "--out", str(tmp_path / "made"), "--json"]
    done = CliRunner().invoke(build_app(), arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["family"], found["num_experts"], found["d_expert"]) == ("qwen3_moe", 64, 64)
    assert found["kl"] < 1e-3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto")
    assert model.config.model_type == "qwen3_moe"
    assert model.config.num_experts == 64
