"""Tuning by reward: the formula, the experts of drawing chosen again, runs that go on, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train.tuning.tuned_models import write_model, write_records
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixtura
from mixtura.errors import SettingError, UserError
from mixtura.train.tuning import reinforcing
from mixtura.train.tuning.reinforcing import Reinforce, Rollouts, advantages, policy_loss

FEW: dict[str, Any] = {
    "num_steps": 4, "num_sequences": 2, "sequence_length": 96, "log_steps": 2, "save_steps": 2, "rank": 2,
    "reinforce": {"group": 2, "max_new_tokens": 5, "reward": "prefix"},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "train.jsonl", 12)


def test_the_gradient_is_the_policy_gradient() -> None:
    logits = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    drawn = torch.tensor([[1, 2, 0], [4, 0, 0], [3, 3, 3], [0, 1, 2]])
    kept = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5])
    likely = logits.log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
    policy_loss(likely, kept, advantages(rewards, 2)).backward()
    wanted = torch.zeros_like(logits)
    gains = [1.0, -1.0, 0.0, 0.0]
    shares = logits.detach().softmax(-1)
    for row, gain in enumerate(gains):
        for place in range(3):
            if kept[row, place]:
                one = torch.zeros(5)
                one[drawn[row, place]] = 1.0
                wanted[row, place] = -gain * (one - shares[row, place]) / 9
    torch.testing.assert_close(logits.grad, wanted, atol=1e-4, rtol=1e-3)


def _batch(tokenizer: Any, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    rows = [(tokenizer(a).input_ids, tokenizer(b, add_special_tokens=False).input_ids) for a, b in pairs]
    width = max(len(a) + len(b) for a, b in rows)
    ids = torch.ones(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for row, (a, b) in enumerate(rows):
        ids[row, : len(a) + len(b)] = torch.tensor(a + b)
        labels[row, len(a) : len(a) + len(b)] = torch.tensor(b)
    return {"input_ids": ids, "labels": labels}


def test_what_drew_an_answer_is_chosen_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = _batch(tokenizer, [("What is this?", " one"), ("And a longer question, then?", " two")])
    gaps = {}
    for replay in (True, False):
        own = AutoModelForCausalLM.from_pretrained(model)
        rollouts = Rollouts(Reinforce(group=3, max_new_tokens=6, replay=replay), tokenizer, 1)
        draw = Rollouts._drawn

        def drawn_then_changed(self: Any, net: Any, *args: Any, draw: Any = draw) -> Any:
            found = draw(self, net, *args)
            # As rounding might do, but for many tokens: the routers' rows trade places after the draw.
            with torch.no_grad():
                for layer in net.model.layers:
                    layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.roll(1, 0))
            return found

        seen: list[torch.Tensor] = []
        monkeypatch.setattr(Rollouts, "_drawn", drawn_then_changed)
        gate = own.model.layers[0].mlp.gate
        handle = gate.register_forward_hook(lambda _, __, out, into=seen: into.append(out[-1]))
        torch.manual_seed(0)
        rollouts.loss(own, batch)
        monkeypatch.setattr(Rollouts, "_drawn", draw)
        handle.remove()
        # The first pass reads the questions, the last one learns: its first choices are of the same tokens.
        first, last = seen[0].view(6, -1, 2), seen[-1].view(6, -1, 2)
        real = torch.arange(first.shape[1]) >= first.shape[1] - 3
        same = (first[:, real].sort(-1).values == last[:, : first.shape[1]][:, real].sort(-1).values).all(-1)
        gaps[replay] = float(same.double().mean())
    assert gaps[True] == 1.0
    assert gaps[False] < 0.5


def test_without_a_change_drawing_and_learning_agree(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rollouts = Rollouts(Reinforce(group=2, max_new_tokens=6), tokenizer, 1)
    loss = rollouts.loss(AutoModelForCausalLM.from_pretrained(model), _batch(tokenizer, [("Say it:", " it")]))
    assert loss.requires_grad
    taken = rollouts.taken()
    assert taken["rollout_gap"] < 1e-4
    assert rollouts.taken() == {}


def test_rewards_are_of_the_answer(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    answer = torch.tensor(tokenizer(" four five", add_special_tokens=False).input_ids)
    exact = Rollouts(Reinforce(), tokenizer, 1)
    prefix = Rollouts(Reinforce(reward="prefix"), tokenizer, 1)
    assert exact._reward(answer, answer) == 1.0
    assert exact._reward(answer[:-1], answer) == 0.0
    assert prefix._reward(answer[:1], answer) == pytest.approx(1 / len(answer))
    assert prefix._reward(answer.flip(0)[:0], answer) == 0.0


@pytest.mark.parametrize("method", ["expert_lora", "lora"])
def test_tunes_by_reward_and_goes_on_exactly(model: Path, data: Path, tmp_path: Path, method: str) -> None:
    whole = tmp_path / "whole"
    done = mixtura.tune(model, data, whole, adapter=method, progress=False, **FEW)
    assert (done.num_steps, done.packed) == (4, False)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if "loss" in line]
    assert [line["step"] for line in told] == [2, 4]
    assert all({"reward", "rollout_gap"} <= set(line) for line in told)
    assert all(line["rollout_gap"] < 1e-3 for line in told)
    assert (whole / "adapter/adapter_model.safetensors").is_file()
    # From the checkpoint in the middle to the same weights.
    kept = load_file(whole / "adapter/adapter_model.safetensors")
    shutil.rmtree(whole / "adapter")
    shutil.rmtree(whole / "checkpoint-4")
    again = mixtura.tune(model, data, whole, adapter=method, progress=False, **FEW)
    assert again.resumed_from == 2
    found = load_file(whole / "adapter/adapter_model.safetensors")
    assert all(torch.equal(kept[name], found[name]) for name in kept)


def test_what_does_not_go_is_refused(model: Path, tmp_path: Path) -> None:
    text = write_records(tmp_path / "text.jsonl", 4, shape="text")
    with pytest.raises(UserError, match="record 0 has none before what is to be learned"):
        mixtura.tune(model, text, tmp_path / "run", progress=False, **FEW)
    with pytest.raises(SettingError, match="group"):
        Reinforce(group=1)
    changed = FEW | {"reinforce": {"reply": True}}
    with pytest.raises(UserError, match="did you mean 'replay'"):
        mixtura.tune(model, text, tmp_path / "run", progress=False, **changed)
    assert not (tmp_path / "run").exists()
    assert reinforcing.advantages(torch.ones(4), 2).tolist() == [0.0] * 4
