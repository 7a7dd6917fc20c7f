"""Recipes have the published sizes, and a tiny scale that trains and goes on to the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mixtura.cli import build_app
from mixtura.errors import UnknownNameError, UserError
from mixtura.modeling.config import MixturaConfig
from mixtura.modeling.counting import count, count_of
from mixtura.modeling.family import MixturaForCausalLM
from mixtura.train.config import TrainConfig
from mixtura.train.recipes import merged, names, read_recipe, recipe, require_memory


@pytest.mark.parametrize("name", names())
def test_counts_are_the_published_ones(name: str) -> None:
    found = recipe(name)
    counted = count(MixturaConfig(**read_recipe(name, "published").model))
    assert counted.active is not None
    layers = read_recipe(name, "published").model.get("layers", [None])
    dense = all(one == "dense" for one in layers)
    assert (counted.active == counted.total) == dense
    assert found.misses("total", counted.total) is None
    assert found.misses("active", counted.active) is None


def test_a_count_that_is_off_is_said() -> None:
    assert recipe("ling_plus").misses("total", 10) == (
        "ling_plus has 10 total parameters, published are 2.9e+11"
    )


@pytest.mark.parametrize("name", names())
def test_the_tiny_scale_learns(name: str) -> None:
    config: TrainConfig = read_recipe(name, "tiny")
    fields = {"vocab_size": 64} | config.model
    model = MixturaForCausalLM(MixturaConfig(**fields)).train()
    assert sum(one.numel() for one in model.parameters()) < 2_000_000
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        output = model(ids, labels=ids)
        torch.autograd.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
        model.end_step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0]


def test_a_recipe_trains_from_the_command_line(tmp_path: Path) -> None:
    small = ["--set", "num_steps=2", "--set", "warmup_steps=0", "--set", "decay_steps=1"]
    small += ["--set", "num_sequences=1", "--set", "sequence_length=8", "--set", "domains=[tasks]"]
    arguments = ["train", "--recipe", "openmoe_8b", "--scale", "tiny", "--experts", "latent", *small]
    done = CliRunner().invoke(build_app(), [*arguments, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    made = MixturaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    plan = made.config.plans[1]
    assert (plan.experts.name, plan.form.name) == ("latent", "then_dense")


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(UnknownNameError, match="no recipe named 'ling'; did you mean 'ling_plus'"):
        recipe("ling")
    with pytest.raises(UnknownNameError, match="no scale of a recipe named 'small'"):
        read_recipe("lola", "small")
    with pytest.raises(UnknownNameError, match="did you mean"):
        read_recipe("lola", "tiny", ["model.hiden_size=3"])
    with pytest.raises(
        UserError, match=r"the recipe lola has 7.4.* parameters, which take .* add --scale tiny"
    ):
        require_memory(read_recipe("lola", "published"), 1 << 30, "lola")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give a YAML file to train, or --recipe NAME"),
        (["some.yaml", "--recipe", "lola"], "give a YAML file to train, or --recipe NAME"),
        (["some.yaml", "--scale", "tiny"], "--scale is of a recipe"),
    ],
)
def test_the_command_says_what_it_needs(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(build_app(), ["train", *arguments])
    assert isinstance(done.exception, UserError)
    assert says in str(done.exception)


def test_mappings_merge_and_null_takes_away() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": None}) == {"a": {"b": 4, "c": 2}}


def test_experts_that_wait_are_not_active() -> None:
    config = MixturaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1,
        moe={"router": {"name": "top_k", "top_k": 2}, "d_expert": 8, "shared_width": 8},
    )  # fmt: skip
    counted = count_of(MixturaForCausalLM(config))
    assert counted.active is not None
    assert counted.total - counted.active == 6 * 3 * 16 * 8
