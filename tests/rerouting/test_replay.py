"""Recording the routing of generated text and replaying it in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from rerouted import assert_alike, gates, gradients, left_padded, model_of, texts
from torch import Tensor
from torch.nn import functional as F

import mixtura
from mixtura.errors import CheckpointError, UnsupportedModelError, UserError
from mixtura.machine.releases import checkpoint_layers
from mixtura.rerouting import Recording

PROMPT = left_padded(texts(3, 6), [6, 3, 5])


def generated(model: Any, new: int = 5) -> tuple[dict[str, Tensor], Recording]:
    """Sampled text as a batch to train on, and the recording of its routing."""
    with torch.random.fork_rng(devices=[]), mixtura.record_routing(model) as recording:
        torch.manual_seed(0)
        ids = model.generate(**PROMPT, max_new_tokens=new, do_sample=True, eos_token_id=None)
    mask = F.pad(PROMPT["attention_mask"], (0, new), value=1)
    return {"input_ids": ids, "attention_mask": mask}, recording


def changed(model: Any) -> Any:
    """The model with other router weights: what some steps of training make of it."""
    with torch.no_grad():
        for gate in gates(model):
            gate.weight.add_(0.3 * torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


def chosen_in(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The experts that each layer's router returns in a pass."""
    found: list[Tensor] = []
    handles = [g.register_forward_hook(lambda m, a, output: found.append(output[2])) for g in gates(model)]
    model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v3", "deepseek_v2", "gpt_oss", "glm4_moe"]
)
def test_what_generation_chose_is_chosen_again_though_the_router_has_changed(family: str) -> None:
    model = model_of(family)
    batch, recording = generated(model)
    mask = batch["attention_mask"].bool()
    changed(model)
    live = chosen_in(model, batch)
    with mixtura.replay_routing(model, recording):
        replayed = chosen_in(model, batch)
    moved = 0
    for place, index in enumerate(recording.choices[0]):
        for row in range(3):
            recorded = recording.choices[row][index]
            # Every token but the last, which generation never read.
            assert len(recorded) == int(mask[row].sum()) - 1
            own = replayed[place].view(3, 11, -1)[row][mask[row]]
            assert torch.equal(own[:-1], recorded.long())
            other = live[place].view(3, 11, -1)[row][mask[row]]
            moved += int((other[:-1].sort(-1).values != own[:-1].sort(-1).values).sum())
    assert moved > 10


def test_weights_are_the_live_routers_own_and_carry_its_gradient() -> None:
    model = model_of("mixtral")
    batch, recording = generated(model)
    changed(model)
    gate = gates(model)[0]
    taken: list[tuple[Tensor, ...]] = []
    gate.register_forward_hook(lambda m, args, output: taken.append((args[0], *output)))
    with mixtura.replay_routing(model, recording):
        model(**batch)
    x, logits, weights, ids = taken[0]
    scores = (x @ gate.weight.T).softmax(-1)
    picked = scores.gather(-1, ids)
    by_hand = picked / picked.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, by_hand)
    (slope,) = torch.autograd.grad(weights[:, 0].sum(), gate.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(by_hand[:, 0].sum(), gate.weight)
    assert slope.abs().sum() > 0
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(logits, x @ gate.weight.T)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_experts_of_groups_that_the_live_router_would_not_choose_have_their_weight(family: str) -> None:
    model = model_of(family)
    batch, recording = generated(model)
    changed(model)
    weights: list[Tensor] = []
    gate = gates(model)[-1]
    gate.register_forward_hook(lambda m, args, output: weights.append(output[1]))
    with mixtura.replay_routing(model, recording):
        model(**batch)
    assert weights[0].min() > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_layers_computed_again_replay_the_same_after_other_passes(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = model_of(family)
        batch, recording = generated(model)
        changed(model).train()
        if checkpointing:
            checkpoint_layers(model, use_reentrant=False)
        with mixtura.replay_routing(model, recording):
            replayed = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        other = model(input_ids=texts(2, 7, seed=4), labels=texts(2, 7, seed=4), use_cache=False).loss
        (replayed + 2 * other).backward()
        found.append(gradients(model))
    assert_alike(*found)


def test_replaying_an_unchanged_model_changes_nothing() -> None:
    model = model_of("qwen3_moe")
    batch, recording = generated(model)
    with torch.no_grad():
        plain = model(**batch).logits
        with mixtura.replay_routing(model, recording):
            again = model(**batch).logits
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
        mixtura.restore(model)
        assert torch.equal(model(**batch).logits, plain)


def test_rows_are_found_by_their_text_whatever_their_order_and_padding() -> None:
    model = model_of("qwen3_moe")
    batch, recording = generated(model)
    changed(model)
    with mixtura.replay_routing(model, recording):
        expected = chosen_in(model, batch)[1].view(3, 11, -1)
        order = torch.tensor([2, 0])
        right = [batch["input_ids"][row][batch["attention_mask"][row].bool()] for row in order]
        width = max(len(row) for row in right)
        ids = torch.stack([F.pad(row, (0, width - len(row))) for row in right])
        mask = torch.stack([(torch.arange(width) < len(row)).long() for row in right])
        made = chosen_in(model, {"input_ids": ids, "attention_mask": mask})[1].view(2, width, -1)
    for place, row in enumerate(order.tolist()):
        length = len(right[place]) - 1
        kept = expected[row][batch["attention_mask"][row].bool()]
        assert torch.equal(made[place, :length], kept[:length])


def test_a_recording_survives_a_file(tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    batch, recording = generated(model)
    recording.save(tmp_path / "routing.safetensors")
    read = Recording.load(tmp_path / "routing.safetensors")
    assert [row.tolist() for row in read.tokens] == [row.tolist() for row in recording.tokens]
    changed(model)
    made = []
    for one in (recording, read):
        with mixtura.replay_routing(model, one):
            made.append(chosen_in(model, batch))
    assert all(torch.equal(first, second) for first, second in zip(*made, strict=True))
    (tmp_path / "cut").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="is no recording"):
        Recording.load(tmp_path / "cut")


def test_other_text_than_was_recorded_is_refused() -> None:
    model = model_of("qwen3_moe")
    batch, recording = generated(model)
    other = batch["input_ids"].clone()
    other[1, -3] = (other[1, -3] + 1) % 60 + 3
    length = int(batch["attention_mask"][1].sum())
    message = f"row 1 is not a text that was recorded: of 3 .* first {length - 3} of {length} tokens"
    with mixtura.replay_routing(model, recording), pytest.raises(UserError, match=message):
        model(input_ids=other, attention_mask=batch["attention_mask"])
    longer = F.pad(batch["input_ids"], (0, 2), value=5)
    mask = F.pad(batch["attention_mask"], (0, 2), value=1)
    with mixtura.replay_routing(model, recording), pytest.raises(UserError, match="row 0 is not"):
        model(input_ids=longer, attention_mask=mask)


def test_what_cannot_be_replayed_is_said() -> None:
    model = model_of("qwen3_moe")
    batch, recording = generated(model)
    with mixtura.replay_routing(model, recording), pytest.raises(UserError, match="not while decoding"):
        model.generate(batch["input_ids"][:1], max_new_tokens=2)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    with mixtura.record_routing(model), pytest.raises(UserError, match="call it with input_ids"):
        model(inputs_embeds=embedded)
    mixtura.set_router(model, "top_p")
    with pytest.raises(UserError, match="restore"), mixtura.record_routing(model):
        pass
    sparse = model_of("phimoe")
    with mixtura.record_routing(sparse) as recording:
        sparse(input_ids=texts())
    with (
        mixtura.replay_routing(sparse, recording),
        pytest.raises(UnsupportedModelError, match="neither biased nor replayed"),
    ):
        sparse(input_ids=texts())


def test_a_canvas_beside_the_text_cannot_be_recorded() -> None:
    model = model_of("diffusion_gemma")
    with (
        torch.random.fork_rng(devices=[]),
        mixtura.record_routing(model),
        pytest.raises(UserError, match="this family's routing cannot be recorded"),
    ):
        model(input_ids=texts(2, 8))


# phimoe chooses step by step with masks in between; diffusion_gemma reads the text in an encoder and
# routes a canvas of its own besides.
_CANNOT = {"phimoe", "diffusion_gemma"}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - _CANNOT))
def test_every_family_replays_what_it_chose(family: str) -> None:
    model = model_of(family)
    batch = {"input_ids": texts(2, 8)}
    with torch.no_grad(), mixtura.record_routing(model) as recording:
        first = model(**batch)[0]
    with torch.no_grad(), mixtura.replay_routing(model, recording):
        torch.testing.assert_close(model(**batch)[0], first, rtol=1e-4, atol=1e-5)
    assert recording.choices[0]
