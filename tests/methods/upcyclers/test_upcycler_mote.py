"""What the upcycler mote promises beyond its kind's contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import dense_model, logits_of, save_dense
from torch.nn import functional as F

import mixtura
from mixtura.errors import SettingError
from mixtura.running.loading import load_own_model


def _made(tmp_path: Path, family: str = "llama", top_k: int = 1, **settings: Any) -> Any:
    source = save_dense(tmp_path / "dense", family)
    how = {"method": "mote", "experts": 3, "top_k": top_k, "settings": settings, "measure": False}
    mixtura.upcycle(source, tmp_path / "out", **how)
    return load_own_model(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_copies_that_put_out_nothing_it_is_the_dense_model(family: str, tmp_path: Path) -> None:
    own = _made(tmp_path, family, scale=0.0)
    torch.testing.assert_close(logits_of(own), logits_of(dense_model(family)), atol=2e-5, rtol=1e-5)
    # And training can move them from there.
    ids = torch.arange(3, 40)[None]
    own.train()(ids, labels=ids).loss.backward()
    for block in own.model.blocks:
        assert float(block.experts.bank.down_proj.grad.abs().sum()) > 0


@torch.no_grad()
def test_a_layer_is_the_whole_part_and_a_rounded_one(tmp_path: Path) -> None:
    own = _made(tmp_path)
    part, layer = dense_model().model.layers[1].mlp, own.model.layers[1].mlp
    seen: dict[str, Any] = {}
    layer.register_forward_hook(lambda _, given, out: seen.update(inputs=given[0], out=out[0]))
    routing = own.model(torch.arange(3, 20)[None]).routings[1]
    x = seen["inputs"].x

    def levels(weight: torch.Tensor) -> torch.Tensor:
        scale = weight.abs().mean()
        return scale * (weight / (scale + 1e-5)).round().clamp(-1, 1)

    def rows(values: torch.Tensor) -> torch.Tensor:
        step = values.abs().amax(-1, keepdim=True) / 127
        return (values / step).round() * step

    gate, up, down = (levels(one.weight) for one in (part.gate_proj, part.up_proj, part.down_proj))
    read = rows(x)
    rounded = rows(F.silu(read @ gate.T) * (read @ up.T)) @ down.T
    weights = torch.zeros(len(x)).index_put((routing.token_ids,), routing.weights)
    # The one expert's probability, by which the router learns.
    torch.testing.assert_close(weights, routing.scores.amax(-1))
    torch.testing.assert_close(seen["out"], part(x) + weights[:, None] * rounded, atol=1e-4, rtol=1e-3)


def test_the_whole_part_stays_as_it_is_in_training(tmp_path: Path) -> None:
    own = _made(tmp_path, top_k=2).train().requires_grad_(True)
    kept = {name: value.clone() for name, value in own.state_dict().items()}
    optimizer = torch.optim.AdamW(own.parameters(), 1e-2, weight_decay=0.1)
    ids = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(6):
        loss = own(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        own.end_step()
    assert losses[-1] < losses[0]
    moved = {name for name, value in own.state_dict().items() if not torch.equal(value, kept[name])}
    assert any(".mlp.experts.bank." in name for name in moved)
    assert any(".mlp.router." in name for name in moved)
    assert not any(".mlp.shared." in name for name in moved)
    # After training and loading again, experts hold three values in each matrix.
    own.save_pretrained(tmp_path / "trained")
    again = load_own_model(tmp_path / "trained")
    assert torch.equal(logits_of(again), logits_of(own.eval()))
    found = again.model.blocks[0].experts.bank.matrices()
    assert {len(one.unique()) for one in found.down} == {3}


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(SettingError, match="scale of Mote"):
        mixtura.create("upcyclers", "mote", scale=-1.0)
