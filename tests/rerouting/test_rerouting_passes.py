"""What a pass is and what is known of its tokens: bare decoders, masks of every form, packed rows, steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from rerouted import assert_alike, gates, gradients, left_padded, model_of, texts, with_adapters, with_labels
from torch import Tensor
from torch.nn import functional as F
from transformers import MixtralForSequenceClassification, Trainer, TrainingArguments

import mixtura
from mixtura.errors import UserError
from mixtura.machine.releases import checkpoint_layers
from mixtura.rerouting.masks import Size, padding_of

BATCH = with_labels(left_padded(texts(4, 10), [10, 7, 9, 4]))
MASK = BATCH["attention_mask"].bool()
# Nothing comes before the first token but padding, from which it is not to be predicted.
BATCH["labels"][MASK.cumsum(-1) == 1] = -100
POSITIONS = (MASK.long().cumsum(-1) - 1).clamp(min=0)


def changed(model: Any) -> None:
    """Give the routers other weights: what some steps of training make of them."""
    with torch.no_grad():
        for gate in gates(model):
            gate.weight.add_(0.3 * torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(1)))


def chosen(model: Any, call: Any) -> Tensor:
    """The experts that reach the experts modules in a call, layer by layer."""
    seen: list[Tensor] = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].clone()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def four_dimensional(mask: Tensor) -> Tensor:
    """The additive mask of queries by keys that says the same of causal text."""
    size = mask.shape[1]
    seen = torch.tril(torch.ones(size, size, dtype=torch.bool))[None, None] & mask.bool()[:, None, None, :]
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def test_a_router_outside_of_any_pass_runs_free_of_the_pass_before() -> None:
    model = model_of("qwen3_moe")
    first, second = texts(1, 8, seed=1), texts(1, 8, seed=2)
    own, other = (
        chosen(model, lambda ids=ids: model.model(input_ids=ids))
        for ids in (second, first)  # type: ignore[misc]
    )
    with torch.no_grad(), mixtura.record_routing(model) as recording:
        model(input_ids=first)
    with mixtura.replay_routing(model, recording):
        chosen(model, lambda: model(input_ids=first))
        # A text that was not recorded is refused in the decoder, too, and a layer by itself routes freely.
        with pytest.raises(UserError, match="is not a text that was recorded"):
            model.model(input_ids=second)
        assert torch.equal(chosen(model, lambda: model.model(input_ids=first)), other)
        hidden = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(3))
        layer = model.model.layers[1].mlp
        found = torch.topk((hidden[0] @ layer.gate.weight.T).softmax(-1), 2).indices
        assert torch.equal(layer.gate(hidden[0])[2].sort().values, found.sort().values)
    assert torch.equal(chosen(model, lambda: model.model(input_ids=second)), own)
    model.model(input_ids=second[:, :5])


def test_the_decoder_called_by_itself_is_recorded() -> None:
    model, ids = model_of("mixtral"), texts(2, 6)
    with torch.no_grad(), mixtura.record_routing(model) as recording:
        model.model(input_ids=ids)
    with torch.no_grad(), mixtura.record_routing(model) as expected:
        model(input_ids=ids)
    assert [row.tolist() for row in recording.tokens] == ids.tolist()
    for one, other in zip(recording.choices, expected.choices, strict=True):
        assert all(torch.equal(one[index], other[index]) for index in other)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_loss_on_the_decoders_states_is_balanced(adapters: bool) -> None:
    found = []
    for whole in (True, False):
        model = model_of("qwen3_moe").train()
        plain = model
        if adapters:
            model = with_adapters(model, "router")
        made = mixtura.balance(model, ["switch_loss", ("loss_free", {"rate": 0.01})])
        if whole:
            loss = model(**BATCH).loss
        else:
            states = plain.model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"])[0]
            logits = plain.lm_head(states)[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, BATCH["labels"][:, 1:].flatten()) + made.loss
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made.end_step()
        found.append(gradients(model) | {f"bias.{i}": bias.clone() for i, bias in made.biases().items()})
    assert_alike(*found)


def test_a_balancing_loss_that_nobody_takes_is_warned_of() -> None:
    model = model_of("qwen3_moe").train()
    made = mixtura.balance(model, "switch_loss")
    model.model(input_ids=texts()).last_hidden_state.sum().backward()
    with pytest.warns(UserWarning, match="add the attribute loss"):
        made.end_step()
    model(input_ids=texts(), labels=texts()).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.end_step()
    for layer in model.model.layers:
        layer.mlp(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)))
    with pytest.warns(UserWarning, match="routers ran 3 times in training outside of a forward pass"):
        made.end_step()


FORMS: dict[str, Any] = {
    "2-D": MASK.long(),
    "additive": four_dimensional(MASK),
    "bool": four_dimensional(MASK) == 0,
    "several heads": four_dimensional(MASK).expand(-1, 4, -1, -1),
    "padding's rows opened": four_dimensional(MASK) * MASK[:, None, :, None],
    "padding sees itself": four_dimensional(MASK) * ~torch.eye(10, dtype=torch.bool),
    "every query the same keys": torch.where(MASK, 0.0, -torch.inf)[:, None, None, :],
    "by type of layer": {"full_attention": four_dimensional(MASK)},
    "by type of layer, some without": {"sliding_attention": None, "full_attention": four_dimensional(MASK)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_mask_says_which_tokens_are_text(form: str) -> None:
    padding = padding_of(FORMS[form], Size(4, 10, 0), torch.device("cpu"))
    assert torch.equal(padding.known, MASK)


@pytest.mark.parametrize("form", ["2-D", "additive"])
def test_padding_counts_nowhere_whatever_form_the_mask_has(form: str) -> None:
    model = model_of("qwen3_moe").train()
    made = mixtura.balance(model, ["switch_loss", "sequence_loss"])
    expected = model(**BATCH, position_ids=POSITIONS).loss
    given = BATCH | {"attention_mask": FORMS[form], "position_ids": POSITIONS}
    torch.testing.assert_close(model(**given).loss, expected)
    mixtura.restore(model)
    with torch.no_grad(), mixtura.record_routing(model) as recording:
        model(**given)
    texts_by_hand = [row[mask].tolist() for row, mask in zip(BATCH["input_ids"], MASK, strict=True)]
    assert [tokens.tolist() for tokens in recording.tokens] == texts_by_hand
    assert made.loss is not None


def test_masks_in_a_cache_of_fixed_length_and_without_padding_are_read() -> None:
    full = torch.ones(2, 16).tril().bool()[:2]
    size = Size(2, 3, 4)
    wide = torch.zeros(2, 16, dtype=torch.long)
    wide[:, :7] = 1
    wide[1, :2] = 0
    assert torch.equal(padding_of(wide, size, full.device).known, wide[:, :7].bool())
    causal = torch.ones(1, 1, 5, 5).tril().bool()
    assert bool(padding_of(causal, Size(3, 5, 0), full.device).known.all())
    assert bool(padding_of(torch.ones(1, 1, 5, 5).bool(), Size(1, 5, 0), full.device).known.all())
    later = torch.ones(2, 1, 3, 7).tril(4).bool()
    later[1, :, :, :2] = False
    assert torch.equal(padding_of(later, size, full.device).known, wide[:, :7].bool())


def test_a_mask_of_an_unknown_form_is_refused_and_not_ignored() -> None:
    model = model_of("qwen3_moe").train()
    mixtura.balance(model, "switch_loss")
    ids = texts(2, 6)
    for mask in (torch.ones(2, 3), torch.ones(3, 6), torch.ones(2, 1, 4, 6)):
        with pytest.raises(UserError, match=r"cannot be read from an attention_mask .*shape \[2, 6\]"):
            model(input_ids=ids, attention_mask=mask)
    with pytest.raises(UserError, match="an attention_mask that is object"):
        model(input_ids=ids, attention_mask={"full_attention": object()})


def packed(how: str) -> dict[str, Tensor]:
    """Three texts in one row, and what says where they begin."""
    lengths = [5, 1, 6]
    row = torch.cat([texts(1, n, seed=n)[0] for n in lengths])[None]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    apart = (numbers[:, None] == numbers[None]) & torch.ones(12, 12).tril().bool()
    forms = {
        "positions": {"position_ids": places},
        "lengths": {"position_ids": places, "cu_seq_lens_q": torch.tensor([0, 5, 6, 12], dtype=torch.int32)},
        "numbers": {"position_ids": places, "seq_idx": numbers[None].int()},
        "mask": {"position_ids": places, "attention_mask": apart[None, None]},
    }
    return {"input_ids": row} | forms[how]


def in_rows() -> dict[str, Tensor]:
    """The same texts, each in a row of its own."""
    rows = [texts(1, n, seed=n)[0] for n in (5, 1, 6)]
    ids = torch.stack([F.pad(row, (0, 6 - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(6) < len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("how", ["positions", "numbers", "mask"])
def test_sequences_packed_in_a_row_are_as_those_in_rows(how: str) -> None:
    model = model_of("qwen3_moe").train()
    made = mixtura.balance(model, "sequence_loss", coefficient=1.0)
    model(**in_rows(), use_cache=False)
    expected = made.loss
    if how == "mask":
        # A text of one token that nobody sees might as well be padding, which a mask cannot tell.
        given = packed(how)
        given["input_ids"], given["position_ids"] = given["input_ids"][:, :5], given["position_ids"][:, :5]
        given["attention_mask"] = given["attention_mask"][..., :5, :5]
        alone = {name: value[:1, :5] for name, value in in_rows().items()}
        model(**alone, use_cache=False)
        expected = made.loss
    else:
        given = packed(how)
    model(**given, use_cache=False)
    torch.testing.assert_close(made.loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["positions", "lengths", "numbers"])
def test_packed_rows_are_recorded_and_replayed_text_by_text(how: str) -> None:
    model = model_of("qwen3_moe")
    with torch.no_grad(), mixtura.record_routing(model) as rows:
        expected = model(**in_rows(), use_cache=False).logits
    with torch.no_grad(), mixtura.record_routing(model) as recording:
        model(**packed(how), use_cache=False)
    assert [one.tolist() for one in recording.tokens] == [one.tolist() for one in rows.tokens]
    changed(model)
    own = chosen(model, lambda: model(**packed(how), use_cache=False))
    with mixtura.replay_routing(model, rows):
        made = chosen(model, lambda: model(**packed(how), use_cache=False))
    for place, index in enumerate(rows.choices[0]):
        by_hand = torch.cat([rows.choices[row][index] for row in range(3)])
        assert torch.equal(made[place].long(), by_hand.long())
    assert not torch.equal(made, own)
    assert expected.isfinite().all()


def test_block_diagonal_masks_keep_texts_apart() -> None:
    numbers = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    apart = (numbers[:, None] == numbers[None]) & torch.ones(7, 7).tril().bool()
    model, ids = model_of("qwen3_moe"), texts(1, 7)
    with torch.no_grad(), mixtura.record_routing(model) as recording:
        model(input_ids=ids, attention_mask=torch.where(apart, 0.0, -1e9)[None, None])
    assert [one.tolist() for one in recording.tokens] == [ids[0, :3].tolist(), ids[0, 3:].tolist()]


@pytest.mark.parametrize("balancer", ["switch_loss", "z_loss", "global_batch"])
@pytest.mark.parametrize("counting", [False, True])
def test_a_step_without_a_label_changes_nothing(balancer: str, counting: bool) -> None:
    model = model_of("qwen3_moe").train()
    made = mixtura.balance(model, balancer, coefficient=1.0)
    ids = texts(2, 8)
    labels = torch.full_like(ids, -100)
    if counting:
        with made.counting():
            model(input_ids=ids, labels=labels)
    model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(0)).loss.backward()
    assert made.loss is not None
    assert made.loss.item() == 0
    assert all(not slope.any() for slope in gradients(model).values())


def test_a_batch_of_padding_alone_has_no_loss_that_is_not_a_number() -> None:
    model = model_of("qwen3_moe").train()
    nothing = torch.zeros(2, 6, dtype=torch.long)
    for name in mixtura.names("balancers"):
        if any(tag.startswith("needs_router") for tag in mixtura.header("balancers", name).tags):
            continue
        # Its own coupling is read by layers of mixtura alone.
        settings = {"ties": "scores"} if name == "conflict_loss" else {}
        made = mixtura.balance(model, (name, settings))
        model(input_ids=nothing, attention_mask=nothing)
        assert made.loss is None or made.loss.isfinite(), name
        mixtura.restore(model)


def test_a_trainer_survives_a_row_without_labels(tmp_path: Any) -> None:
    rows = [{"input_ids": row, "labels": row.clone()} for row in texts(6, 8)]
    rows[2]["labels"] = torch.full_like(rows[2]["labels"], -100)
    model = model_of("qwen3_moe")
    made = mixtura.balance(model, ["switch_loss", "loss_free"])
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, max_steps=6, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, bf16=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[made.callback]).train()  # type: ignore[arg-type]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_labels_of_whole_rows_are_not_shifted() -> None:
    config = model_of("mixtral").config
    config.num_labels = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForSequenceClassification(config).train()
    made = mixtura.balance(model, "switch_loss", coefficient=1.0)
    ids, labels = texts(2, 6), torch.tensor([0, 2])
    model(input_ids=ids, labels=labels)
    whole = made.loss
    model(input_ids=ids, labels=labels, num_items_in_batch=8)
    assert whole is not None
    torch.testing.assert_close(made.loss, whole * 2 / 8)


@pytest.mark.parametrize("where", ["attention", "experts", "router", None])
def test_reentrant_checkpointing_is_refused_also_with_adapters(where: str | None) -> None:
    model = model_of("qwen3_moe").train()
    if where is not None:
        model = with_adapters(model, where)
        model.enable_input_require_grads()
    checkpoint_layers(model, use_reentrant=True)
    made = mixtura.balance(model, "switch_loss")
    with pytest.raises(UserError, match="the balancing loss has no gradient"):
        model(**BATCH, use_cache=False)
    # Evaluation and counting need none.
    with made.counting():
        model(**BATCH, use_cache=False)
    mixtura.restore(model)
    mixtura.balance(model, "loss_free")
    model(**BATCH, use_cache=False).loss.backward()


def test_reentrant_checkpointing_replays_in_the_backward_pass() -> None:
    found = []
    for reentrant in (None, True):
        model = model_of("qwen3_moe")
        first, second = texts(2, 7, seed=1), texts(2, 7, seed=2)
        with torch.no_grad(), mixtura.record_routing(model) as recording:
            model(input_ids=first)
            model(input_ids=second)
        with torch.no_grad():
            for gate in gates(model):
                gate.weight.add_(
                    0.3 * torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(1))
                )
        model.train()
        if reentrant:
            model.enable_input_require_grads()
            checkpoint_layers(model, use_reentrant=True)
        with mixtura.replay_routing(model, recording):
            one = model(input_ids=first, labels=first, use_cache=False).loss
            two = model(input_ids=second, labels=second, use_cache=False).loss
        (one + 2 * two).backward()
        found.append(gradients(model))
    assert_alike(*found)
