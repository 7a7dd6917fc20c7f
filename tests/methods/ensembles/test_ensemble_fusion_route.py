"""FusionRoute against a loop over tokens, its two losses against their formulas, and what it runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mixtura.authoring.contracts._read_together import built, said, team
from mixtura.errors import SettingError
from mixtura.methods.ensembles import NO_TARGET, Lesson
from mixtura.methods.ensembles.fusion_route import FusionRoute
from mixtura.running.ensembling.lessons import Pair, Row
from mixtura.running.ensembling.training import Training, train

TOKENS = torch.tensor([[5, 3, 60, 3, 3, 17, 0, 41], [9, 9, 2, 31, 44, 8, 1, 6]])


def test_it_is_the_router_and_the_expert_that_it_picks() -> None:
    method = FusionRoute()
    of = team(method)
    built(method, of, apart=0.5)
    assert of.own is not None
    with torch.no_grad():
        mixed = method(of.read(TOKENS))
        own = of.own(input_ids=TOKENS, output_hidden_states=True)
        experts = [model(input_ids=TOKENS).logits for model in of.models]
    picked = set()
    for row in range(2):
        for column in range(TOKENS.shape[1]):
            scores = method.head.weight @ own.hidden_states[-1][row, column] + method.head.bias
            best = int(scores.argmax())
            picked.add(best)
            product = own.logits[row, column].softmax(-1) * experts[best][row, column].softmax(-1)
            found = mixed.log_probabilities[row, column].exp()
            assert torch.allclose(found, product / product.sum(), atol=1e-5)
            assert mixed.shares[row, column].tolist() == [float(place == best) for place in (0, 1)]
    assert picked == {0, 1}, "the case must have tokens of both experts"


def test_a_router_that_says_nothing_leaves_plain_selection() -> None:
    text = said(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), own=torch.tensor([7.0, 7.0]))
    method = FusionRoute()
    method.build(text.facts)
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.copy_(torch.tensor([0.0, 1.0]))
        found = method(text).log_probabilities[0, 0]
    assert torch.allclose(found, text.says[1].log_softmax(-1))


def test_an_expert_that_is_not_picked_does_not_run() -> None:
    method = FusionRoute()
    of = team(method)
    built(method, of)
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.copy_(torch.tensor([1.0, 0.0]))
        text = of.read(TOKENS[:1, :3], grows=True)
        method(text)
        for place in range(3, 7):
            text.extend(TOKENS[:1, place : place + 1])
            method(text)
        assert text.num_passes == [5, 0, 5]
        method.head.bias.copy_(torch.tensor([0.0, 1.0]))
        text.extend(TOKENS[:1, 7:8])
        late = method(text).log_probabilities[0, -1]
        whole = method(of.read(TOKENS[:1])).log_probabilities[0, -1]
    # What it had missed it reads in one piece.
    assert text.num_passes == [5, 1, 6]
    assert text.num_tokens == [7, 8, 8]
    assert torch.allclose(late, whole, atol=1e-4)


def test_the_head_learns_where_experts_differ_and_only_there() -> None:
    # Experts agree on what is likeliest: nothing for the head, whatever the target.
    for experts, counts in (([[0.0, 2.0], [1.0, 3.0]], False), ([[0.0, 2.0], [3.0, 1.0]], True)):
        text = said(torch.tensor(experts), token_ids=[0, 1, 0], own=torch.tensor([0.5, 0.0]))
        method = FusionRoute()
        method.build(text.facts)
        targets = torch.tensor([[1, 0, NO_TARGET]])
        loss = method.loss("tuning", [Lesson(text, targets)])
        own = F.cross_entropy(text.says[2].expand(2, 2), torch.tensor([1, 0]))
        wanted = float(own)
        if counts:
            scores = (method.head.weight.sum(1) + method.head.bias).log_softmax(-1)
            for target in (1, 0):
                held = [float(one.softmax(-1)[target]) for one in text.says[:2]]
                soft = torch.tensor(held).log().softmax(-1)
                wanted += -float((soft * scores).sum()) / 2
        assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)


def test_preferences_are_dpo_of_the_sum() -> None:
    torch.manual_seed(0)
    text = said(torch.randn(2, 3), token_ids=[0, 1, 2], own=torch.randn(3))
    method = FusionRoute(beta=0.3)
    method.build(text.facts)
    sides = [torch.tensor([[NO_TARGET, 1, 2]]), torch.tensor([[NO_TARGET, 0, 0]])]
    before = [torch.tensor([-1.7]), torch.tensor([-2.9])]
    loss = method.loss("preference", [Lesson(text, *one) for one in zip(sides, before, strict=True)])
    with torch.no_grad():
        each = method(text).log_probabilities[0]
    gained = [
        sum(float(each[column, side[0, column]]) for column in (1, 2)) - float(known)
        for side, known in zip(sides, before, strict=True)
    ]
    wanted = math.log1p(math.exp(-0.3 * (gained[0] - gained[1])))
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)


def test_a_stage_that_just_began_has_the_loss_of_a_coin() -> None:
    rows = [Row(tuple(one), 3) for one in TOKENS.tolist()]
    method = FusionRoute()
    of = team(method)
    how = Training(steps=1, batch=1, learning_rate=0.0, own_learning_rate=0.0)
    _, stage = train(method, of, rows, how, [Pair(rows[0], rows[1])])
    assert stage.first == pytest.approx(math.log(2), abs=1e-6)


def test_preferences_leave_the_head_and_raise_what_is_preferred() -> None:
    rows = [Row(tuple(one), 3) for one in TOKENS.tolist()]
    pairs = [Pair(rows[0], Row((*rows[0].token_ids[:3], 1, 2, 3), 3))]
    method, alone = FusionRoute(), FusionRoute()
    how = Training(steps=8, batch=1, learning_rate=0.0, own_learning_rate=1e-3)
    stages = train(method, team(method), rows, how, pairs)
    train(alone, team(alone), rows, how)
    assert stages[1].last < math.log(2) - 0.01
    assert torch.equal(method.head.weight, alone.head.weight)


def test_training_makes_a_text_likelier_and_is_the_same_again() -> None:
    rows = [Row(tuple(one), 3) for one in TOKENS.tolist()]
    losses = []
    for tunes in ("router", "sum", "sum"):
        method = FusionRoute(tunes=tunes)
        (stage,) = train(method, team(method), rows, Training(steps=12, batch=2, own_learning_rate=3e-3))
        assert stage.last < stage.first - 0.2
        losses.append(stage.last)
    assert losses[1] == losses[2] != losses[0]


@pytest.mark.parametrize(("name", "value"), [("beta", -1), ("head_weight", 1e9), ("beta", float("nan"))])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=name):
        FusionRoute(**{name: value})
