"""Balancers in training: one update a step, whatever the step is cut into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modeling.tiny_models import some_ids, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import mixtura
from mixtura.errors import UserError
from mixtura.methods.balancers.conflict_loss import ConflictLoss
from mixtura.methods.balancers.quantile import Quantile
from mixtura.modeling.balance import LayerBalance
from mixtura.modeling.family import MixturaForCausalLM
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import BalancerInput, LayerShape, RouterInput

BIASED = {"balancers": ["loss_free", {"name": "switch_loss", "coefficient": 1.0}]}


def padded(rows: Tensor) -> dict[str, Tensor]:
    """A batch whose later rows end earlier, in padding."""
    mask = torch.ones_like(rows)
    mask[-1, 6:] = 0
    return {"input_ids": rows, "attention_mask": mask, "labels": rows.masked_fill(mask == 0, -100)}


def batches() -> list[dict[str, Tensor]]:
    """Two micro-batches of different numbers of tokens."""
    return [padded(some_ids(2, 10, seed=1)), padded(some_ids(2, 10, seed=2))]


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The micro-batches as one batch."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def num_labels(parts: list[dict[str, Tensor]]) -> int:
    """Labels that count, after the shift."""
    return sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)


def step(model: MixturaForCausalLM, parts: list[dict[str, Tensor]], total: int, *, ahead: bool) -> None:
    """One optimizer step over micro-batches."""
    model.train()
    if ahead:
        model.count_ahead(parts)
    for part in parts:
        torch.autograd.backward(model(**part, num_items_in_batch=total).loss)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.end_step()
    model.zero_grad()


def assert_same(one: MixturaForCausalLM, two: MixturaForCausalLM) -> None:
    """Weights and balancer states agree within rounding."""
    for (name, first), second in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, msg=lambda text, name=name: f"{name}: {text}")


def test_micro_batches_are_the_batch() -> None:
    whole, cut = tiny_model(BIASED), tiny_model(BIASED)
    parts = batches()
    step(whole, [together(parts)], num_labels(parts), ahead=False)
    step(cut, parts, num_labels(parts), ahead=True)
    assert_same(whole, cut)


def test_counting_ahead_draws_the_same_noise() -> None:
    model = tiny_model({"router": "noisy_top_k", "balancers": ["switch_loss"]}).train()
    parts = batches()
    model.count_ahead(parts)
    counted = model.model.balance.whole
    assert counted is not None
    routed = [model(**part, output_routing=True).routings for part in parts]
    for layer, load in enumerate(counted.loads):
        assert torch.equal(load, sum(one[layer].load for one in routed).double())


def test_the_bias_moves_once_a_step_by_the_load_of_all_parts() -> None:
    model = tiny_model({"balancers": [{"name": "loss_free", "rate": 0.5}]}).train()
    loads = torch.zeros(4)
    parts = batches()
    for part in parts:
        output = model(**part, output_routing=True)
        loads += output.routings[0].load
    assert model.model.balance.of(0).bias.tolist() == [0.0] * 4
    model.end_step()
    assert torch.equal(model.model.balance.of(0).bias, 0.5 * (loads.mean() - loads).sign())


def test_evaluation_leaves_balancers_alone() -> None:
    model = tiny_model(BIASED)
    ids = some_ids()
    assert model(ids, labels=ids).aux_loss is None
    model.train()
    with torch.no_grad():
        model(ids, labels=ids)
    model.end_step()
    assert not model.model.balance.of(0).bias.any()


def test_experts_dropped_in_training_are_back_at_inference(tmp_path: Path) -> None:
    plain, ids = tiny_model(), some_ids()
    model = tiny_model({"balancers": [{"name": "moec", "dropout": 0.5}]}).train()
    torch.autograd.backward(model(ids, labels=ids).loss)
    model.end_step()
    assert sum(int((~model.model.balance.of(place).allowed).sum()) for place in (0, 1)) == 4
    dropped = [model.model.balance.of(place).allowed.logical_not() for place in (0, 1)]
    trained = model(ids, output_routing=True).routings
    assert all((one.load[gone] == 0).all() for one, gone in zip(trained, dropped, strict=True))
    model.save_pretrained(tmp_path)
    for one in (model.eval(), MixturaForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(one(ids).logits, plain(ids).logits)


def test_counting_ahead_counts_as_in_training_whatever_the_mode() -> None:
    moe = {"router": "noisy_top_k", "balancers": ["switch_loss"]}
    counted = []
    for training in (True, False):
        model = tiny_model(moe).train(training)
        model.count_ahead(batches())
        assert model.training == training
        counted.append(model.model.balance.whole)
    assert all(torch.equal(a, b) for a, b in zip(counted[0].loads, counted[1].loads, strict=True))


@pytest.mark.parametrize("balancer", ["z_loss", "switch_loss", "global_batch"])
def test_parts_that_the_caller_averages_add_what_the_whole_does(balancer: str) -> None:
    moe = {"balancers": [{"name": balancer, "coefficient": 1.0}]}
    rows = together(batches())
    parts = [{name: value[row : row + 1] for name, value in rows.items()} for row in range(4)]
    expected = tiny_model(moe).train()(**rows).aux_loss
    model = tiny_model(moe).train()
    model.count_ahead(parts)
    found = torch.stack([model(**part).aux_loss for part in parts])
    torch.testing.assert_close(found.mean(), expected)


def test_a_batch_without_a_label_changes_nothing_and_is_a_number() -> None:
    model = tiny_model(BIASED).train()
    ids = some_ids()
    for total in (None, 0, torch.tensor(0)):
        model.zero_grad()
        loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=total).loss
        torch.autograd.backward(loss)
        assert torch.isfinite(loss)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        if total is not None:
            assert loss == 0
            assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_rows_of_padding_count_nowhere() -> None:
    part = padded(some_ids(2, 10, seed=1))
    empty = {name: torch.cat([value, value[:1]]) for name, value in part.items()}
    empty["attention_mask"][-1], empty["labels"][-1] = 0, -100
    moe = {"balancers": ["loss_free", "switch_loss", "z_loss", "sequence_loss", "entropy", "quantile"]}
    outputs = []
    for given in (part, empty):
        model = tiny_model(moe).train()
        outputs.append(model(**given))
        torch.autograd.backward(outputs[-1].loss)
        model.end_step()
        outputs[-1].bias = model.model.balance.of(0).bias
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    torch.testing.assert_close(outputs[0].aux_loss, outputs[1].aux_loss)
    torch.testing.assert_close(outputs[0].bias, outputs[1].bias)


def test_a_bias_from_each_part_becomes_their_mean() -> None:
    model = tiny_model({"balancers": ["quantile"]}).train()
    start, parts = {"bias": torch.zeros(4)}, []
    for part in batches():
        (routing, _) = model(**part, output_routing=True).routings
        parts.append(Quantile().update(BalancerInput(routing=routing, state=start))["bias"])
    assert not torch.allclose(parts[0], parts[1])
    model.end_step()
    torch.testing.assert_close(model.model.balance.of(0).bias, torch.stack(parts).mean(0))


def test_global_counts_are_those_of_the_step_so_far() -> None:
    moe = {"balancers": [{"name": "global_batch", "coefficient": 1.0}]}
    model = tiny_model(moe | {"router": {"name": "top_k", "top_k": 1}}).train()
    for step in range(2):
        seen = torch.zeros(2, 4)
        for part in batches():
            output = model(**part, output_routing=True)
            expected = 0.0
            for layer, routing in enumerate(output.routings):
                seen[layer] += routing.load
                scores = routing.scores[routing.valid].mean(0)
                expected += 4 * float((seen[layer] / seen[layer].sum() * scores).sum())
            assert output.aux_loss.item() == pytest.approx(expected, rel=1e-5), step
        model.end_step()


@pytest.mark.parametrize("how", ["to", "bfloat16", "half", "from_config", "default"])
def test_states_stay_in_float32(how: str) -> None:
    moe = {"balancers": ["loss_free", "alf_lb", "quantile", {"name": "conflict_loss"}]}
    if how == "from_config":
        model = AutoModelForCausalLM.from_config(tiny_config(moe), dtype=torch.bfloat16)
    elif how == "default":
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = tiny_model(moe)
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        model = tiny_model(moe)
        model = model.to(torch.bfloat16) if how == "to" else getattr(model, how)()
    assert model.lm_head.weight.dtype == (torch.float16 if how == "half" else torch.bfloat16)
    layer = model.model.balance.of(0)
    held = {name: value.dtype for name, value in layer.state_dict().items()}
    assert set(held.values()) == {torch.float32}, held
    assert torch.equal(layer.ties, torch.full((4, 4), 0.1).fill_diagonal_(1.0))
    assert model.double().model.balance.of(0).bias.dtype == torch.float64


def test_small_steps_add_up_in_a_bfloat16_model() -> None:
    model = tiny_model({"balancers": [{"name": "loss_free", "rate": 0.001}]}).bfloat16().train()
    ids = some_ids()
    layer = model.model.balance.of(0)
    layer.get_buffer("0_bias").copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    routing = model(ids, output_routing=True).routings[0]
    for _ in range(200):
        layer.update([lambda which: BalancerInput(routing=routing, state=layer.state(which))])
    missing = (routing.load.float().mean() - routing.load).sign()
    torch.testing.assert_close(layer.bias, torch.tensor([1.0, 0.0, 0.0, 0.0]) + 0.2 * missing)


def test_losses_are_computed_exactly_under_autocast() -> None:
    names = ["switch_loss", "z_loss", "entropy", "importance", "sequence_loss", "erc_loss"]
    model = tiny_model({"balancers": [{"name": name, "coefficient": 1.0} for name in names]}).train()
    routings = model(some_ids(), output_routing=True).routings
    ids = torch.arange(2).repeat_interleave(10)
    plain = model.model.balance.losses(model.model.blocks, routings, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.model.balance.losses(model.model.blocks, routings, ids)
    torch.testing.assert_close(rounded, plain, rtol=1e-6, atol=0)


def test_two_passes_are_compared() -> None:
    model = tiny_model({"router": {"name": "thor"}}).train()
    ids = some_ids()
    assert model(ids, labels=ids).aux_loss > 0
    assert model.eval()(ids, labels=ids).aux_loss is None


def test_predictions_of_padding_are_not_compared() -> None:
    ids = some_ids(2, 10)
    mask = torch.ones_like(ids)
    longer = {
        "input_ids": torch.cat([ids, torch.zeros(2, 12, dtype=torch.long)], dim=1),
        "attention_mask": torch.cat([mask, torch.zeros(2, 12, dtype=torch.long)], dim=1),
        "labels": torch.cat([ids, torch.full((2, 12), -100)], dim=1),
    }
    plain = tiny_model({"router": "thor"}).train()(ids, attention_mask=mask, labels=ids)
    other = tiny_model({"router": "thor"}).train()(**longer)
    torch.testing.assert_close(plain.aux_loss, other.aux_loss)
    torch.testing.assert_close(plain.loss, other.loss)


def test_layers_of_other_routers_do_not_dilute_the_comparison() -> None:
    ids = some_ids()
    model = tiny_model(
        {}, layers=[{"router": {"name": "thor", "consistency_coefficient": 3.0}}, None]
    ).train()
    passes = [model.model(ids, use_cache=False, draw=draw).last_hidden_state for draw in (0, 1)]
    first, second = (model.lm_head(one)[:, :-1].log_softmax(-1) for one in passes)
    divergence = (first.exp() - second.exp()) * (first - second)
    expected = 3 * divergence.sum() / 2 / first.shape[:2].numel()
    torch.testing.assert_close(model(ids, labels=ids).aux_loss, expected)


def trained_for(coefficient: float, steps: int = 3) -> MixturaForCausalLM:
    """A model after steps with the balancer conflict_loss."""
    model = tiny_model({"balancers": [{"name": "conflict_loss", "coefficient": coefficient}]}).train()
    ids = some_ids()
    for _ in range(steps):
        torch.autograd.backward(model(ids, labels=ids).loss)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.end_step()
        model.zero_grad()
    return model


def test_conflicts_change_what_the_model_says(tmp_path: Path) -> None:
    none, much = trained_for(0.0).eval(), trained_for(10.0).eval()
    assert not torch.allclose(none(some_ids()).logits, much(some_ids()).logits, atol=1e-3)
    assert not any("gradients" in name for name in much.state_dict())
    much.save_pretrained(tmp_path)
    again = MixturaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(some_ids()).logits, much(some_ids()).logits)
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in much.named_parameters() if parameter.requires_grad}


def test_every_parameter_has_a_gradient_from_the_first_step_on() -> None:
    model = tiny_model({"balancers": ["conflict_loss"]}).train()
    ids = some_ids()
    torch.autograd.backward(model(ids, labels=ids).loss)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.model.balance.of(0).get_parameter("0_alpha").grad.abs().sum() > 0


def test_ties_weigh_experts_that_meet_at_a_token() -> None:
    shape = LayerShape(d_model=8, d_expert=6, num_experts=4)
    layer = MoELayer(mixtura.create("routers", "top_k", shape, top_k=2), Experts(shape))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    ties = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    plain, routing = layer(RouterInput.of(x))
    tied, weighed = layer(RouterInput.of(x), ties)
    expected = torch.zeros_like(plain)
    for token in range(5):
        met = routing.expert_ids[routing.token_ids == token].tolist()
        for expert in met:
            place = (routing.token_ids == token) & (routing.expert_ids == expert)
            strength = sum(float(ties[expert, other].sigmoid()) for other in met) / len(met)
            weight = float(routing.weights[place]) * strength
            assert float(weighed.weights[place]) == pytest.approx(weight, rel=1e-5)
            one = torch.tensor([token]), torch.tensor([expert])
            expected[token] += weight * layer.experts.matrices.run(x, *one)[0]
    torch.testing.assert_close(tied, expected)
    mixer = MoELayer(mixtura.create("mixers", "dense", shape), Experts(shape))
    with pytest.raises(UserError, match="leave ties out"):
        mixer(RouterInput.of(x), ties)


def test_ties_that_nobody_reads_are_refused() -> None:
    shape = LayerShape(d_model=8, d_expert=6, num_experts=4)
    with pytest.raises(UserError, match="ConflictLoss trains alpha, which nothing in this model reads"):
        LayerBalance([ConflictLoss()], shape)
    assert LayerBalance([ConflictLoss(ties="scores")], shape).ties is None
