"""Recordings of passes that go on from caches: in turns, cropped, moved, copied."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from rerouted import left_padded, model_of, texts
from torch import Tensor

import mixtura
from mixtura.errors import UserError
from mixtura.rerouting import Recording

IDS = texts(2, 8)


def whole(model: Any, batch: dict[str, Tensor]) -> Recording:
    """The recording of texts read at once."""
    with torch.no_grad(), mixtura.record_routing(model) as recording:
        model(**batch, use_cache=False)
    return recording


def cropped(cache: Any, count: int) -> None:
    """Take the last tokens out of a cache; older releases tell `crop` how many to keep instead."""
    takes = "tokens_to_remove" in inspect.signature(type(cache).crop).parameters
    cache.crop(-count if takes else cache.get_seq_length() - count)


def assert_same(made: Recording, expected: Recording) -> None:
    """The same texts with the same experts."""
    assert [one.tolist() for one in made.tokens] == [one.tolist() for one in expected.tokens]
    for one, other in zip(made.choices, expected.choices, strict=True):
        assert all(torch.equal(one[i].sort().values, other[i].sort().values) for i in other)


def test_caches_used_in_turns_go_on_each_with_its_own_sequence() -> None:
    model = model_of("qwen3_moe")
    with torch.no_grad(), mixtura.record_routing(model) as recording:
        caches = [model(input_ids=row[None, :4], use_cache=True).past_key_values for row in IDS]
        for column in range(4, 8):
            for row, cache in zip(IDS, caches, strict=True):
                model(input_ids=row[None, column : column + 1], past_key_values=cache)
    assert_same(recording, whole(model, {"input_ids": IDS}))


def test_padded_rows_of_a_cache_go_on_and_shrink_column_by_column() -> None:
    model = model_of("mixtral")
    batch = left_padded(IDS, [8, 5])
    mask = batch["attention_mask"]
    with torch.no_grad(), mixtura.record_routing(model) as recording:
        cache = model(input_ids=batch["input_ids"][:, :6], attention_mask=mask[:, :6]).past_key_values
        cropped(cache, 2)
        assert [len(one) for one in recording.tokens] == [4, 1]
        rest = batch["input_ids"][:, 4:]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, 4:]
        model(input_ids=rest, attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert_same(recording, whole(model, batch))


def test_rejected_candidates_are_taken_out_of_the_recording() -> None:
    model = model_of("qwen3_moe")
    text = torch.tensor([[5, 9, 20, 5, 9, 20, 5, 9]])
    with torch.no_grad(), mixtura.record_routing(model) as recording:
        made = model.generate(
            input_ids=text,
            attention_mask=torch.ones_like(text),
            do_sample=False,
            max_new_tokens=8,
            prompt_lookup_num_tokens=3,
            eos_token_id=None,
        )
    assert [one.tolist() for one in recording.tokens] == [made[0, :-1].tolist()]
    with torch.no_grad(), mixtura.replay_routing(model, recording):
        model(input_ids=made, use_cache=False)


def test_beam_search_is_refused_while_it_is_recorded() -> None:
    model = model_of("qwen3_moe")
    with mixtura.record_routing(model), pytest.raises(UserError, match="beam search moves sequences"):
        model.generate(IDS, num_beams=2, do_sample=False, max_new_tokens=4, eos_token_id=None)
    made = model.generate(IDS, num_beams=2, do_sample=False, max_new_tokens=4, eos_token_id=None)
    assert made.shape == (2, 12)


def test_a_cache_that_was_not_recorded_is_refused() -> None:
    model = model_of("qwen3_moe")
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
        with mixtura.record_routing(model) as recording:
            with pytest.raises(UserError, match="a cache that was not recorded; record from the first"):
                model(input_ids=IDS[:, 4:5], past_key_values=cache)
            own = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
            copied = copy.deepcopy(own)
            with pytest.raises(UserError, match="not recorded"):
                model(input_ids=IDS[:, 4:5], past_key_values=copied)
            model(input_ids=IDS[:, 4:5], past_key_values=own)
        # Fed outside of the recording, it holds more than was recorded.
        model(input_ids=IDS[:, 5:6], past_key_values=own)
    assert [len(one) for one in recording.tokens] == [5, 5]
    cropped(copied, 2)
    cropped(own, 2)
    assert [len(one) for one in recording.tokens] == [5, 5]
