"""The arena's models, what is measured on them, and a contest from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mixtura.cli import build_app
from mixtura.errors import SettingError, UnknownNameError
from mixtura.methods import names
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.counting import count
from mixtura.train.arena.entries import KINDS, REFERENCE, entries
from mixtura.train.arena.judge import balance, changed, judge, specialisation
from mixtura.train.arena.race import Run, make_model, perform, result_of
from mixtura.train.arena.run import Contest
from mixtura.train.arena.scale import Scale
from mixtura.train.arena.text import HeldOut, Text
from mixtura.types import LayerShape

VOCABULARY = 97
NUM_STEPS = 4


def small_text() -> Text:
    """Random text of three domains."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(3, VOCABULARY, (4000,), generator=generator).numpy()
    parts = tuple(HeldOut(torch.from_numpy(stream[:512].copy()).view(4, 128), 1016, n) for n in range(3))
    return Text(dict.fromkeys(("code", "prose", "tasks"), stream), parts, VOCABULARY)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_has_a_model_of_the_same_experts(kind: str) -> None:
    found = {entry.name: entry for entry in entries(kind, 100)}
    assert set(names(kind)) <= set(found)
    sizes = {}
    for name, entry in found.items():
        model = make_model(entry.model, 4096, 0)
        sizes[name] = sum(p.numel() for p in model.parameters())
        for block in model.model.blocks if kind in ("routers", "balancers", "mixers") else ():
            own = block.experts
            shape = getattr(own, "members", [own])[0].shape
            assert shape.num_experts * shape.d_expert == 8 * 128
    assert sizes[REFERENCE] <= 2_000_000


def test_names_that_do_not_take_part() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'top_p'"):
        entries("routers", 10, ["top_pp"])
    with pytest.raises(UnknownNameError, match="did you mean 'routers'"):
        entries("router", 10)
    with pytest.raises(SettingError, match="at least"):
        Contest(kind="routers", num_tokens=5)


def test_another_scale_is_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "scale.yaml"
    file.write_text("hidden_size: 64\nnum_experts: 4\nd_expert: 32\n")
    scale = Scale.read(file)
    assert (scale.hidden_size, scale.num_hidden_layers, dict(scale.wide)) == (
        64,
        2,
        {"num_experts": 2, "d_expert": 64},
    )
    (entry,) = entries("routers", 10, [REFERENCE], scale)
    model = make_model(entry.model, VOCABULARY, 0, scale)
    assert model.model.blocks[0].experts.shape == LayerShape(64, 32, 4)
    assert Run(kind="routers", entry=entry, seed=0, num_steps=9).digest != (
        Run(kind="routers", entry=entry, seed=0, num_steps=9, scale=scale).digest
    )
    for text, message in (
        ("hiden_size: 64", "did you mean 'hidden_size'"),
        ("d_expert: wide", "must be of type int"),
        ("num_experts: 5", "a multiple of top_k"),
        ("num_sequences: 0", "num_sequences"),
    ):
        file.write_text(text)
        done = CliRunner().invoke(build_app(), ["arena", "routers", "--model", str(file)])
        assert done.exit_code != 0
        assert message in str(done.exception)


def test_a_model_that_knows_nothing_needs_the_bits_of_a_token() -> None:
    (entry,) = entries("routers", 10, [REFERENCE])
    model = make_model(entry.model, VOCABULARY, 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    text = small_text()
    found = judge(model, text.held_out)
    tokens = 4 * 127
    assert found.bits == pytest.approx([math.log2(VOCABULARY) * tokens / 1016] * 3, rel=1e-5)
    assert found.experts_per_token == 2
    assert found.loads is not None
    assert found.loads.shape == (2, 3, 8)
    assert found.loads.sum() == 2 * 3 * 512 * 2


def test_balance_specialisation_and_change_by_hand() -> None:
    loads = torch.tensor([[[4.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0]]])
    assert balance(loads) == {"max_over_mean": 2.0, "dead_experts": 2.0}
    assert specialisation(loads) == 1.0
    assert specialisation(torch.ones(2, 3, 4)) == 0.0
    assert changed([frozenset({1, 2})], [frozenset({2, 3})]) == 0.5
    assert changed([], []) == 0.0


@pytest.mark.parametrize("kind", ["experts", "forms"])
def test_a_token_takes_as_much_arithmetic_with_all_of_them(kind: str) -> None:
    found = {entry.name: entry for entry in entries(kind, 100)}

    def active(name: str) -> int:
        counted = count(MixturaConfig(**(Scale().config | dict(found[name].model)), vocab_size=8)).active
        assert counted is not None
        return counted

    plain = active(REFERENCE)
    assert plain > 4 * 96 * 128
    for name in names(kind):
        assert active(name) == pytest.approx(plain, rel=0.08), name


def test_attentions_take_part_at_equal_projections() -> None:
    found = {entry.name: entry for entry in entries("attentions", 100)}
    width, head = Scale().hidden_size, Scale().head_dim

    def per_token(name: str) -> float:
        config = MixturaConfig(**(Scale().config | dict(found[name].model)), vocab_size=8)
        settings = config.attentions[0].settings
        if name == "sparse_heads":
            ordinary = settings["num_dense"]
            chosen = (config.num_attention_heads - ordinary) / settings["sparsity"]
            return 4 * width * head * (ordinary + chosen)
        if name == "selective_heads":
            return 4 * width * head * settings["top_heads"]
        return 2 * width * head * (config.num_attention_heads + config.num_key_value_heads)

    assert {*names("attentions")} < {*found}
    for name in names("attentions"):
        assert per_token(name) == per_token(REFERENCE), name
    assert found["sparse_heads"].tags
    assert not found["sparse_heads"].leaks


def test_loads_of_grids_are_those_of_rows_and_columns() -> None:
    found = {entry.name: entry for entry in entries("experts", 10)}
    small = Scale(hidden_size=16, num_attention_heads=1, num_hidden_layers=1, d_expert=12)
    (entry,) = (one for one in entries("experts", 10, ["atomic"], small) if one.name == "atomic")
    judged = judge(make_model(entry.model, VOCABULARY, 0, small), small_text().held_out)
    assert judged.loads is not None
    assert [tuple(one.shape) for one in judged.loads] == [(3, 12), (3, 12)]
    assert set(balance(judged.loads)) == {"max_over_mean", "dead_experts"}
    assert 0 <= specialisation(judged.loads) <= 1
    assert found["product"].model["moe"]["num_experts"] == 256


@pytest.mark.slow
def test_a_run_is_kept_and_found_again(tmp_path: Path) -> None:
    (entry,) = entries("routers", NUM_STEPS, [REFERENCE])
    run = Run(kind="routers", entry=entry, seed=0, num_steps=NUM_STEPS)
    assert result_of(run, tmp_path) is None
    made = perform(run, small_text(), tmp_path)
    assert result_of(run, tmp_path) == made
    again = perform(run, small_text(), tmp_path)
    timed = {"seconds", "overhead_us", "time_ratio"}
    assert {k: v for k, v in made.items() if k not in timed} == {
        k: v for k, v in again.items() if k not in timed
    }
    assert result_of(Run(kind="routers", entry=entry, seed=0, num_steps=5), tmp_path) is None
    run.file(tmp_path).write_text("{")
    assert result_of(run, tmp_path) is None


@pytest.mark.slow
def test_the_command_writes_the_page_and_goes_on(tmp_path: Path) -> None:
    scale = tmp_path / "scale.yaml"
    scale.write_text("hidden_size: 32\nnum_hidden_layers: 1\nnum_attention_heads: 1\nd_expert: 32\n")
    arguments = [
        "arena", "routers", "--only", "hash", "--seeds", "2", "--tokens", "5120", "--threads", "1",
        "--model", str(scale),
        "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"),
    ]  # fmt: skip
    done = CliRunner().invoke(build_app(), arguments)
    assert done.exit_code == 0, done.output
    assert "4/4" in done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"routers.md", "routers.csv", "routers.svg"}
    (tmp_path / "runs/baselines/hash-1.json").unlink()
    again = CliRunner().invoke(build_app(), [*arguments, "--json"])
    assert "1/1 hash, seed 1" in again.stderr
    assert {one["name"] for one in json.loads(again.stdout)} == {"hash", "top_k"}
