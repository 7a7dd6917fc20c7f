"""What the decoder spec_ee promises beyond its kind's contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixtura.authoring.contracts._decoded import model, samples, tokenizer
from mixtura.errors import UserError
from mixtura.methods import create
from mixtura.methods.decoders._exits import predict, trained_predictor
from mixtura.methods.decoders.spec_ee import SpecEe
from mixtura.running.decoders.calibrating import calibrate_on
from mixtura.running.decoders.entry import decode
from mixtura.running.decoders.probing import save_calibration


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec_ee") / "spec_ee.safetensors"
    save_calibration(
        calibrate_on(model(), SpecEe(drafts=64, tested=1.0), samples(), tokenizer=tokenizer()), path
    )
    return path


def test_what_can_be_told_apart_is_learnt() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 6, generator=generator)
    right = rows[:, 0] > 0
    made = {name: one[None] for name, one in trained_predictor(rows, right).items()}
    assert ((predict(made, 0, rows) > 0.5) == right).float().mean() > 0.95


@torch.no_grad()
def test_exits_say_the_likeliest_token_of_their_layer_and_it_is_a_draft(file: Path) -> None:
    inside: Any = model()
    ran: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, given, made, place=place: ran.append(place))
        for place, layer in enumerate(inside.model.layers)
    ]
    made = decode(inside, tokenizer(), "abcde", SpecEe(threshold=0.0), calibration=file, max_new_tokens=8)
    for hook in hooks:
        hook.remove()
    # Where nearly all tokens are drafts, new tokens leave at the first layer that is tested.
    steps = len(made.token_ids) - 1
    assert made.cost.layer_passes == len(ran) < 4 * (steps + 1)
    text = torch.tensor([tokenizer().encode("abcde", add_special_tokens=False)])
    assert made.token_ids[0] == int(inside(text).logits[0, -1].argmax())


def test_above_one_nothing_is_left(file: Path) -> None:
    made = decode(model(), tokenizer(), "abcde", SpecEe(threshold=1.1), calibration=file, max_new_tokens=5)
    assert made.cost.layer_passes == 4 * len(made.token_ids)


def test_it_grows_one_branch(file: Path) -> None:
    both = [create("decoders", "spec_ee"), create("decoders", "best_of_n", n=2)]
    with pytest.raises(UserError, match="a decoder that leaves layers grows one branch"):
        decode(model(), tokenizer(), "abc", both, calibration=file, max_new_tokens=3)


@torch.no_grad()
def test_what_prompts_took_that_are_decoded_one_by_one_is_added_up(file: Path) -> None:
    def cost_of(*prompts: str) -> Any:
        made = decode(model(), tokenizer(), list(prompts), SpecEe(), calibration=file, max_new_tokens=4)
        assert len({id(one.cost) for one in made}) == 1
        return made[0].cost

    one, other, both = cost_of("abcde"), cost_of("cd"), cost_of("abcde", "cd")
    assert both.num_tokens == one.num_tokens + other.num_tokens
    assert both.num_passes == one.num_passes + other.num_passes
