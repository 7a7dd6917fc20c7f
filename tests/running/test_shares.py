"""Shares of experts that are learned: which win, what they predict, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dense_checkpoints import save_dense
from safetensors.torch import load_file
from tiny_checkpoints import run_mixtura
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import mixtura
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.data.tokens import TokenBatch
from mixtura.errors import SettingError
from mixtura.running.shares import MixedExperts, learned_shares


def tokens(rows: int = 6, places: int = 20) -> TokenBatch:
    ids = torch.randint(3, 64, (rows, places), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    return TokenBatch(ids, mask, torch.zeros(rows, dtype=torch.long), ("text",))


def three_experts(folder: Path) -> Path:
    """Experts that are one part with more and more of its neurons drawn anew."""
    source = save_dense(folder / "dense")
    mixtura.upcycle(source, folder / "moe", experts=3, settings={"redrawn": 0.5}, measure=False)
    return folder / "moe"


@torch.no_grad()
def loss_of(model: torch.nn.Module, text: TokenBatch) -> float:
    """Row by row, without padding."""
    total, count = 0.0, 0
    for ids, mask in zip(text.input_ids, text.attention_mask.bool(), strict=True):
        own = ids[mask][None]
        total += float(F.cross_entropy(model(own).logits[0, :-1].float(), own[0, 1:], reduction="sum"))
        count += own.shape[1] - 1
    return total / count


@pytest.mark.parametrize("first", [None, 0.75])
def test_matrices_are_averages_by_the_shares(first: float | None, tmp_path: Path) -> None:
    view = open_checkpoint(three_experts(tmp_path))
    mixed = MixedExperts(view, first)
    with torch.no_grad():
        mixed.logits["1"].copy_(torch.linspace(-1, 1, len(mixed.logits["1"])))
    found = mixed.matrices()
    for layer in view.layers:
        shares = mixed.shares(layer.index)
        assert float(shares.sum()) == pytest.approx(1)
        assert first is None or float(shares[0]) == pytest.approx(first)
        for name, part in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            wanted = sum(float(shares[e]) * getattr(layer.expert(e), part).float() for e in range(3))
            torch.testing.assert_close(found[f"model.layers.{layer.index}.mlp.{name}.weight"], wanted)


def test_learning_finds_better_averages_and_touches_nothing(tmp_path: Path) -> None:
    path, text = three_experts(tmp_path), tokens()
    mixtura.condense(path, tmp_path / "even", progress=False)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "even")
    before = {name: one.clone() for name, one in dense.state_dict().items()}
    even = loss_of(dense, text)
    said: list[str] = []
    found = learned_shares(open_checkpoint(path), dense, text, passes=10, notify=said.append)
    assert all(torch.equal(one, before[name]) for name, one in dense.state_dict().items())
    assert len(said) == 10
    # The first pass begins at the plain average.
    assert float(said[0].rpartition(" ")[2]) == pytest.approx(even, abs=0.05)
    mixtura.condense(path, tmp_path / "learned", shares=found, progress=False)
    assert loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "learned"), text) < even
    again = learned_shares(open_checkpoint(path), dense, text, passes=10)
    assert again == found


def test_the_command(tmp_path: Path) -> None:
    path, out = three_experts(tmp_path), tmp_path / "out"
    said = ["--tokens", "300", "--passes", "2", "--first", "0.75", "--out", str(out), "--json"]
    done = run_mixtura("condense", str(path), "--shares", "learned", *said)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shares"] == "learned"
    assert "pass 2 of 2: loss" in done.stderr
    assert not (tmp_path / "out.even").exists()
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts"
    experts = torch.stack([before[f"{name}.{e}.w1.weight"].flatten() for e in range(3)])
    mixed = after["model.layers.0.mlp.gate_proj.weight"].flatten()
    solved = torch.linalg.lstsq(experts.T, mixed[:, None]).solution.flatten()
    assert float(solved[0]) == pytest.approx(0.75, abs=1e-3)
    assert float(solved.sum()) == pytest.approx(1, abs=1e-3)


def test_bad_settings(tmp_path: Path) -> None:
    path = three_experts(tmp_path)
    for first in (1.0, -0.1, 1.5):
        with pytest.raises(SettingError, match="first"):
            MixedExperts(open_checkpoint(path), first)
    refused = run_mixtura("condense", str(path), "--first", "0.5", "--out", str(tmp_path / "out"))
    assert refused.returncode == 2
    assert "give --shares learned as well" in " ".join(refused.stderr.split())
    refused = run_mixtura(
        "condense", str(path), "--shares", "learned", "--first", "1", "--out", str(tmp_path / "out")
    )
    assert refused.returncode == 2
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.even").exists()
