"""What the upcycler growing_transformers promises beyond its kind's contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import dense_model, logits_of, save_dense
from transformers import AutoModelForCausalLM

import mixtura
from mixtura.checkpoints.upcycling.growing import grow
from mixtura.errors import SettingError, UserError
from mixtura.types import Plan
from mixtura.types.upcycling import Grow

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "olmo2": {},
    "gemma": {},
    "phi3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["top", "spread"])
@pytest.mark.parametrize("start", ["copied", "drawn"])
def test_the_deeper_model_is_the_model(family: str, place: str, start: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", family, **FAMILIES[family])
    settings = {"layers": 2, "place": place, "start": start}
    made = mixtura.upcycle(
        source, tmp_path / "out", method="growing_transformers", settings=settings, measure=False
    )
    assert (made.family, made.promised) == (family, True)
    assert made.added_layers == ((2, 3) if place == "top" else (1, 3))
    deeper = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert deeper.config.num_hidden_layers == 4
    dense = dense_model(family, **FAMILIES[family])
    assert torch.equal(logits_of(deeper), logits_of(dense))
    new, old = (deeper.model.layers[n].state_dict() for n in made.added_layers[:2])
    moved = [name for name in new if "norm" not in name and not torch.equal(new[name], old[name])]
    assert bool(moved) or start == "copied"
    assert all(not value.any() for name, value in new.items() if "o_proj" in name or "down_proj" in name)


def test_new_layers_learn_while_all_else_is_frozen(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    made = mixtura.upcycle(source, tmp_path / "out", method="growing_transformers", measure=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").requires_grad_(False)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    (number,) = made.added_layers
    trained = list(model.model.layers[number].requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(trained, 1e-2)
    ids = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    new = f"model.layers.{number}."
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])}
    assert moved
    assert all(name.startswith(new) for name in moved)


def test_what_came_of_it_is_tried_and_published(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    made = mixtura.upcycle(source, tmp_path / "out", method="growing_transformers")
    assert made.beside is not None
    assert (made.beside.largest, made.beside.same_token) == (0.0, 1.0)
    assert made.before[0].perplexity == made.after.perplexity
    published = json.loads((tmp_path / "out" / "upcycled.json").read_text())
    assert published["added_layers"] == [2]
    assert "the new layers 2" in (tmp_path / "out" / "README.md").read_text()
    grown = Plan.from_json((tmp_path / "out" / "plan.json").read_text())
    assert [action.after for action in grown.actions if isinstance(action, Grow)] == [1]
    assert not (tmp_path / "out.work").exists()
    # Another layer on top of the one that was added.
    again = mixtura.upcycle(tmp_path / "out", tmp_path / "more", method="growing_transformers", measure=False)
    assert again.added_layers == (3,)


def test_what_does_not_go_is_refused(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    with pytest.raises(UserError, match="leave --experts and --target out"):
        mixtura.upcycle(source, tmp_path / "out", method="growing_transformers", experts=4)
    with pytest.raises(SettingError, match="layers"):
        mixtura.create("upcyclers", "growing_transformers", layers=0)
    with pytest.raises(UserError, match="names layer 5, and the model has 0 to 1"):
        grow(Plan("sha256:0", (Grow(5, 5),)), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
