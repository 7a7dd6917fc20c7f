"""What the decoder des promises beyond its kind's contract."""

from __future__ import annotations

import pytest
from deciding import several

from mixtura.authoring.contracts._decoded import model, tokenizer, verifier
from mixtura.authoring.contracts.decoders import sample_prompt
from mixtura.errors import SettingError, UserError
from mixtura.methods.decoders.des import Des
from mixtura.running.decoders.entry import decode


def numbers(made: Des) -> list[int]:
    views = [one.views[0] for one in made.open(sample_prompt())]
    return [2 if view.plain else int(view.steering[0].ranks[1]) for view in views]


def test_rollouts_are_shared_out_among_numbers_of_experts() -> None:
    assert numbers(Des(rollouts=5, experts=[1, 2, 4])) == [1, 1, 2, 2, 4]
    assert numbers(Des(rollouts=6)) == [1, 1, 2, 2, 3, 3]
    assert numbers(Des(rollouts=1)) == [2]


def test_the_best_quarter_goes_on_with_its_own_number_of_experts() -> None:
    made = Des(rollouts=8, experts=[1, 4])
    candidates = several("abcdefgh")
    for place, (one, branch) in enumerate(zip(candidates, made.open(sample_prompt()), strict=True)):
        one.branch, one.verdicts = branch, [float(place % 5)]
    # Scores 0 1 2 3 4 0 1 2: the best two are the fifth and the fourth.
    assert made.choose(candidates) == [4, 4, 4, 4, 3, 3, 3, 3]
    candidates[4].finished = True
    assert made.choose(candidates) == [4, *[3] * 7]


def test_steps_are_lines_and_end() -> None:
    made = Des(steps=1)
    (one,) = several(["ab\n"])
    assert made.ends_step(one)
    one.step_ends = [3]
    assert not made.ends_step(one)
    assert not made.ends_step(several(["\n"])[0])


def test_cost_is_the_sum_of_the_numbers_of_experts() -> None:
    made = decode(
        model(), tokenizer(), "abcde", "des", rollouts=2, experts=[1, 3], verifier=verifier, max_new_tokens=2
    )
    # The prompt of 5 tokens once with each number, then a token of each branch, in 4 layers.
    assert all(len(one.token_ids) == 2 for one in made.branches)
    assert made.cost.num_assignments == 4 * (5 + 1) * (1 + 3)


def test_refusals() -> None:
    with pytest.raises(UserError, match="experts of Des must be at most the 8"):
        Des(experts=[9]).open(sample_prompt())
    with pytest.raises(SettingError, match="experts of Des must be in"):
        Des(experts=[0])
    with pytest.raises(UserError, match="Des chooses by a verifier; give one with --verifier"):
        decode(model(), tokenizer(), "a", "des")
