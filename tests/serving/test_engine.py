"""Requests together get what they would get alone, come and go at any step, and leave nothing behind."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from serving_helpers import GREEDY, Answer, answered, asked, send
from tiny_checkpoints import save_tiny, tiny_tokenizer

import mixtura
from mixtura.errors import CheckpointError, UserError
from mixtura.running.generation import new_tokens
from mixtura.running.tiers.opening import Wish
from mixtura.serving.engine.caches import measured_cost
from mixtura.serving.engine.deciding import Steers
from mixtura.serving.engine.lanes import Lane
from mixtura.serving.engine.loop import Engine, Limits, engine_of
from mixtura.serving.engine.passing import Passes
from mixtura.serving.engine.prefixes import Prefixes
from mixtura.serving.engine.records import BusyError, ClosingError, Sampling, TooLongError

CONTEXT = 96
ROOM = 4 << 20
# Whose caches lie side by side; that slide; that keep a state, or are the family's own.
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoehybrid", "olmoe")


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 60) for _ in range(draw.randrange(2, 40))] for _ in range(num)]


def alone(model: object, prompt: list[int], num: int = 12) -> list[int]:
    made = new_tokens(model, torch.tensor(prompt), max_new_tokens=num)  # type: ignore[arg-type]
    return made.tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    made = engine_of(
        mixtura.load(path), tiny_tokenizer(), Limits(context=CONTEXT, running=8, waiting=16), ROOM
    )
    yield made
    made.close(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_together_as_alone(family: str, tmp_path: Path) -> None:
    model = mixtura.load(save_tiny(tmp_path, family))
    texts = prompts(6)
    expected = [alone(model, text) for text in texts]
    engine = engine_of(model, tiny_tokenizer(), Limits(context=CONTEXT, running=4), ROOM)
    try:
        # The second time, what was read is there, in the form that the family's cache has.
        for _ in range(2):
            found = answered(engine, *(asked(text) for text in texts))
            assert [answer.ids for answer in found] == expected
        assert engine.prefixes.running_bytes == 0
        if family == "qwen3_moe":
            assert engine.passes.together
    finally:
        engine.close(0)


def test_a_step_is_shared(engine: Engine) -> None:
    answered(engine, *(asked(text, 20) for text in prompts(8)))
    assert engine.counts.step_rows > 2 * engine.counts.steps


def test_a_conversation_goes_on_without_being_read_again(engine: Engine) -> None:
    first = prompts(1, seed=3)[0] + [5] * 20
    (answer,) = answered(engine, asked(first))
    assert answer.num_cached == 0
    longer = first + answer.ids + [7, 8, 9]
    (again,) = answered(engine, asked(longer))
    assert again.num_cached == len(first) + len(answer.ids) - 1
    assert again.ids == alone(engine.model, longer)
    # And the same prompt, of which the last token must be read for what comes after it.
    (same,) = answered(engine, asked(longer))
    assert same.num_cached == len(longer) - 1


def test_a_running_text_lends_its_beginning(engine: Engine) -> None:
    prompt = prompts(1, seed=4)[0] + [6] * 30
    group = object()
    found = answered(engine, *(asked(prompt, group=group) for _ in range(4)))
    assert [answer.num_cached for answer in found] == [0] + [len(prompt) - 1] * 3
    assert {tuple(answer.ids) for answer in found} == {tuple(alone(engine.model, prompt))}


def test_memory_is_set_apart_and_beginnings_make_room(path: Path) -> None:
    model = mixtura.load(path)
    engine = engine_of(model, tiny_tokenizer(), Limits(context=CONTEXT, running=8), ROOM)
    token = engine.prefixes.cost.token_bytes
    engine.close(0)
    room = token * CONTEXT * 2
    engine = engine_of(model, tiny_tokenizer(), Limits(context=CONTEXT, running=8), room)
    try:
        most = 0
        answers = send(engine, *(asked([n + 3] * 40, 30) for n in range(6)))
        while not all(answer.over.is_set() for answer in answers):
            most = max(most, engine.prefixes.running_bytes + engine.prefixes.kept_bytes)
            time.sleep(0.001)
        assert all(len(answer.wait().ids) == 30 for answer in answers)
        assert token * 70 <= most <= room
        assert 0 < engine.prefixes.kept_bytes <= room
    finally:
        engine.close(0)


def test_a_kept_beginning_is_gone_on_from_where_it_must_go_and_a_running_text_shares_less(
    path: Path,
) -> None:
    model = mixtura.load(path)
    passes, cost = Passes(model, Steers(model, None)), measured_cost(model)
    prefixes = Prefixes(model, cost, cost.of(100))

    def admitted(prompt: list[int], running: Sequence[Lane] = ()) -> Lane:
        row = Lane(asked(prompt, 4), list(prompt))
        assert prefixes.admit([row], running)
        while row.is_reading:
            passes.read(row)
        return row

    first = list(range(3, 43))
    prefixes.release(admitted(first))
    running = admitted(first[:20] + [60] * 20)
    assert (running.num_cached, prefixes.num_kept) == (20, 1)
    # With what runs there is no room for both the beginning and the text that goes on from it.
    row = admitted([*first, 7], [running])
    assert (row.num_cached, prefixes.num_kept) == (40, 0)
    row.ids.append(9)
    (logits,) = passes.step([row])
    with torch.no_grad():
        expected = model(torch.tensor([[*first, 7, 9]])).logits[0, -1]
    assert torch.allclose(logits, expected, atol=1e-4)
    for one in (row, running):
        prefixes.release(one)
    assert prefixes.running_bytes == 0


def test_a_cache_too_small_for_the_context_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match="too little for one text of 96 tokens"):
        engine_of(mixtura.load(path), tiny_tokenizer(), Limits(context=CONTEXT), 1000)


def test_what_is_too_long_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(TooLongError, match="90 tokens and the answer may have 7"):
        engine.submit([asked([5] * 90, 7)], [Answer().take])


def test_taking_back_frees_the_place_at_once(engine: Engine) -> None:
    running = [Answer() for _ in range(8)]
    take_back = [engine.submit([asked([5, 6], 90)], [answer.take]) for answer in running]
    for answer in running:
        assert answer.began.wait(60)
    (late,) = send(engine, asked([7, 8, 9], 3))
    take_back[0]()
    late.wait()
    assert running[0].finish == "cancelled"
    assert len(late.ids) == 3
    for back in take_back:
        back()
    for answer in running:
        answer.wait()
    assert engine.prefixes.running_bytes == 0


def test_too_many_are_told_to_come_again(path: Path) -> None:
    limits = Limits(context=CONTEXT, running=1, waiting=2)
    engine = engine_of(mixtura.load(path), tiny_tokenizer(), limits, ROOM)
    try:
        first = send(engine, asked([5], 90))
        assert first[0].began.wait(60)
        answers = send(engine, asked([5], 90), asked([6], 90))
        with pytest.raises(BusyError) as caught:
            send(engine, asked([7], 2))
        assert caught.value.retry_after_s >= 1
        assert all(answer.wait().finish in ("stop", "length") for answer in first + answers)
    finally:
        engine.close(0)


def test_random_cancellations_leave_nothing_behind(engine: Engine) -> None:
    draw = random.Random(1)
    expected = {tuple(text): alone(engine.model, text, 8) for text in prompts(6, seed=9)}
    kept = []
    for _ in range(60):
        text = draw.choice(list(expected))
        answer = Answer()
        try:
            back = engine.submit([asked(text, 8)], [answer.take])
        except BusyError:
            time.sleep(0.02)
            continue
        if draw.random() < 0.5:
            time.sleep(draw.random() * 0.01)
            back()
        else:
            kept.append((text, answer))
    assert kept
    for text, answer in kept:
        assert answer.wait().ids == expected[tuple(text)]
    engine.close(30)
    assert engine.prefixes.running_bytes == 0
    assert engine.num_running == engine.num_waiting == 0


def test_draws_depend_on_the_seed_alone(engine: Engine) -> None:
    drawn = Sampling(temperature=1.5, seed=4)
    requests = [
        asked([5, 6, 7], sampling=drawn),
        asked([5, 6, 7], sampling=Sampling(temperature=1.5, seed=5)),
    ]
    together = answered(engine, *requests, asked([9, 9]))
    by_itself = answered(engine, requests[0])
    assert together[0].ids == by_itself[0].ids
    assert together[1].ids != together[0].ids


def test_log_probabilities_are_those_of_the_model(engine: Engine) -> None:
    prompt = prompts(1, seed=2)[0] + [4] * 40
    (answer,) = answered(engine, asked(prompt, 2, num_top=3, reads_prompt=True))
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    (said,) = [piece.prompt for piece in answer.pieces if piece.prompt is not None]
    assert [token.token for token in said] == prompt
    assert said[0].logprob is None
    expected = [float(logits[place, token]) for place, token in enumerate(prompt[1:])]
    assert [token.logprob for token in said[1:]] == pytest.approx(expected, abs=1e-4)
    first = answer.pieces[0].tokens[0]
    assert first.logprob == pytest.approx(float(logits[-1].max()), abs=1e-4)
    assert first.top[0].token == first.token
    assert len(first.top) == 3


def test_penalties_and_biases_change_what_is_picked(engine: Engine) -> None:
    plain, pushed, never_twice = answered(
        engine,
        asked([5, 6]),
        asked([5, 6], sampling=Sampling(temperature=0, logit_bias=((11, 100.0),))),
        asked([5, 6], sampling=Sampling(temperature=0, presence_penalty=2.0, frequency_penalty=2.0)),
    )
    assert pushed.ids == [11] * 12
    assert len(set(never_twice.ids)) >= len(set(plain.ids))


def test_a_stop_string_ends_a_text_and_is_not_in_it(engine: Engine) -> None:
    (whole,) = answered(engine, asked([5, 6], 30))
    text = whole.text
    stop = text[4:7]
    (cut,) = answered(engine, asked([5, 6], 30, stops=(stop,)))
    assert cut.text == text[: text.index(stop)]
    assert cut.finish == "stop"


def test_from_disk_as_in_memory_and_a_shard_that_goes(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    texts = prompts(5)
    expected = [alone(mixtura.load(path), text) for text in texts]
    model = mixtura.load(path, memory=Wish(pool_slots=4))
    engine = engine_of(model, tiny_tokenizer(), Limits(context=CONTEXT), ROOM)
    try:
        found = answered(engine, *(asked(text) for text in texts))
        assert [answer.ids for answer in found] == expected
        (shard,) = path.glob("*.safetensors")
        whole = shard.read_bytes()
        shard.write_bytes(whole[: len(whole) // 4])
        broken = answered(engine, *(asked([*text[:-1], 60]) for text in texts))
        failed = [answer.error for answer in broken if answer.error is not None]
        assert failed
        assert all(isinstance(error, CheckpointError) for error in failed)
        assert "model.safetensors" in str(failed[0])
        shard.write_bytes(whole)
        assert answered(engine, asked(texts[0]))[0].ids == expected[0]
        assert engine.prefixes.running_bytes == 0
    finally:
        engine.close(0)


def test_closing_lets_texts_finish_and_takes_no_more(engine: Engine) -> None:
    (answer,) = send(engine, asked([5, 6], 30))
    assert engine.close(60)
    assert len(answer.wait().ids) == 30
    with pytest.raises(ClosingError):
        send(engine, asked([5]))


def test_closing_without_patience_tells_whoever_waits(path: Path) -> None:
    engine = engine_of(mixtura.load(path), tiny_tokenizer(), Limits(context=CONTEXT, running=1), ROOM)
    answers = send(engine, asked([5], 90), asked([6], 90, sampling=GREEDY))
    assert not engine.close(0)
    assert all(isinstance(answer.wait().error, ClosingError) for answer in answers)
