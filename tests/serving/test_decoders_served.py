"""Requests that choose decoders get what each decoder gives alone, whatever runs beside them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_helpers import SPECIMEN, Answer, answered, asked
from tiny_checkpoints import run_mixtura, save_tiny, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import mixtura
from mixtura.data.tokens import encode_text
from mixtura.errors import UserError
from mixtura.methods import create, names
from mixtura.running.decoders.calibrating import calibrate_on
from mixtura.running.decoders.entry import decode
from mixtura.running.decoders.probing import save_calibration
from mixtura.running.tiers.opening import Wish
from mixtura.serving.engine.deciding import require_served
from mixtura.serving.engine.loop import Engine, Limits, engine_of
from mixtura.serving.engine.records import Sampling, TooLongError
from mixtura.serving.opening import Serving, open_model

CONTEXT = 64
# Steered in each way that there is, drawn, and as it is.
ASKED: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("", {}, 0.0),
    ("scmoe", {}, 0.0),
    ("scmoe", {"beta": 1.0, "rank": 2, "alpha": 0.0}, 0.8),
    ("mask_experts", {"experts": [[1, 1], [2, 2]]}, 0.0),
    ("sampling", {}, 0.7),
    ("greedy", {}, 0.9),
    ("layer_skipping", {}, 0.0),
)
SERVED = {
    "c3po", "greedy", "layer_skipping", "mask_experts", "modes", "multilingual_steering", "online_pruning",
    "rice", "sampling", "scmoe",
}  # fmt: skip


def made(name: str, settings: dict[str, Any]) -> Any:
    return require_served([create("decoders", name, **settings)]) if name else None


def texts(num: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choice("abcdefgh ") for _ in range(draw.randrange(3, 40))) for _ in range(num)]


def ids_of(text: str) -> list[int]:
    return encode_text(text, tiny_tokenizer())


def alone(
    model: Any, text: str, name: str, settings: dict[str, Any], temperature: float, num: int = 10
) -> list[int]:
    found = decode(
        model, tiny_tokenizer(), text, create("decoders", name or "sampling", **settings)
        if name or temperature else "greedy", max_new_tokens=num, temperature=temperature, seed=3,
    )  # fmt: skip
    return list(found.token_ids)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    found = open_model(path, Serving(context=CONTEXT, running=16, cache_bytes=1 << 20)).engine
    yield found
    found.close(0)


def check_mixed(engine: Engine, model: Any) -> None:
    requests, expected = [], []
    for place, text in enumerate(texts(2 * len(ASKED))):
        name, settings, temperature = ASKED[place % len(ASKED)]
        sampling = Sampling(temperature=temperature, seed=3)
        requests.append(asked(ids_of(text), 10, sampling=sampling, decoder=made(name, settings)))
        expected.append((name, alone(model, text, name, settings, temperature)))
    for answer, (name, ids) in zip(answered(engine, *requests), expected, strict=True):
        assert answer.error is None, name
        assert answer.ids == ids, name
    assert engine.prefixes.running_bytes == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3"])
def test_all_in_one_batch(family: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / family, family)
    engine = open_model(path, Serving(context=CONTEXT, running=16)).engine
    try:
        check_mixed(engine, mixtura.load(path))
        # Caches with a window, as mixtral's, take a text a step.
        assert family == "mixtral" or engine.counts.step_rows > 3 * engine.counts.steps
    finally:
        engine.close(0)


def test_on_a_model_that_runs_from_disk(path: Path) -> None:
    engine = open_model(path, Serving(context=CONTEXT, running=16, memory=Wish(pool_slots=4))).engine
    try:
        check_mixed(engine, mixtura.load(path))
    finally:
        engine.close(0)


def test_a_model_is_as_it_was_once_nothing_is_steered(path: Path, engine: Engine) -> None:
    inside: Any = engine.model
    (plain,) = answered(engine, asked(ids_of("abcdef"), 8))
    answered(engine, asked(ids_of("abcdef"), 8, decoder=made("scmoe", {})))
    assert all("forward" not in vars(module) for module in inside.modules())
    assert answered(engine, asked(ids_of("abcdef"), 8))[0].ids == plain.ids


def test_what_was_read_steered_is_not_taken_for_another(engine: Engine) -> None:
    prompt = ids_of("abcdefgh" * 6)
    masked = {"experts": [[1, 1]]}
    kinds = [("", {}), ("mask_experts", masked), ("mask_experts", {"experts": [[1, 2]]}), ("scmoe", {})]
    first = {}
    for place, (name, settings) in enumerate(kinds):
        (answer,) = answered(engine, asked(prompt, 6, decoder=made(name, settings)))
        # One view of the contrast is the model as it is, but the other was never read.
        assert answer.num_cached == 0, name
        first[place] = answer.ids
    for place, (name, settings) in enumerate(kinds):
        (again,) = answered(engine, asked(prompt, 6, decoder=made(name, settings)))
        assert again.num_cached == len(prompt) - 1, name
        assert again.ids == first[place], name
    assert len({tuple(ids) for ids in first.values()}) > 1


def test_skipped_layers_leave_no_beginning_of_new_tokens(engine: Engine) -> None:
    prompt = ids_of("hgfedcba" * 4)
    (answer,) = answered(engine, asked(prompt, 8, decoder=made("layer_skipping", {})))
    longer = [*prompt, *answer.ids, 5, 6, 7]
    (after,) = answered(engine, asked(longer, 4))
    assert after.num_cached == len(prompt)


def test_memory_is_set_apart_for_every_view(path: Path) -> None:
    model = mixtura.load(path)
    whole = engine_of(model, tiny_tokenizer(), Limits(context=CONTEXT))
    one = whole.prefixes.cost.of(CONTEXT)
    whole.close(0)
    engine = engine_of(model, tiny_tokenizer(), Limits(context=CONTEXT), one)
    try:
        prompt = ids_of("abcdefgh" * 6)
        (plain,) = answered(engine, asked(prompt, 10))
        assert plain.error is None
        (both,) = answered(engine, asked(prompt, 10, decoder=made("scmoe", {})))
        assert isinstance(both.error, TooLongError)
        (short,) = answered(engine, asked(prompt[:20], 10, decoder=made("scmoe", {})))
        assert short.error is None
        assert engine.prefixes.running_bytes == 0
    finally:
        engine.close(0)


def test_taking_back_frees_every_view(engine: Engine) -> None:
    answer = Answer()
    take_back = engine.submit([asked(ids_of("abc"), 50, decoder=made("scmoe", {}))], [answer.take])
    assert answer.began.wait(60)
    take_back()
    answer.wait()
    assert engine.prefixes.running_bytes == 0


def test_dense_models_and_settings_of_other_models_are_refused(engine: Engine) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    dense = engine_of(LlamaForCausalLM(config).eval(), tiny_tokenizer(), Limits(context=64))
    try:
        refused, plain = answered(dense, asked([5, 6, 7], 4, decoder=made("scmoe", {})), asked([5, 6, 7], 4))
        assert isinstance(refused.error, UserError)
        assert plain.error is None
    finally:
        dense.close(0)
    wrong, none = answered(
        engine,
        asked(ids_of("abc"), 4, decoder=made("mask_experts", {"experts": [[9, 0]]})),
        asked(ids_of("abc"), 4, decoder=made("modes", {})),
    )
    assert "layer 9" in str(wrong.error)
    assert "start the server with --calibration FILE" in str(none.error)


def test_a_calibration_is_read_from_the_servers_files(path: Path, tmp_path: Path) -> None:
    model = mixtura.load(path)
    records = [("abc", "de", ""), ("fgh", "ab", ""), ("cde", "hg", "")]
    files = []
    for name in ("modes", "rice"):
        files.append(tmp_path / f"{name}.safetensors")
        settings = {"thinking": [5, 6]} if name == "rice" else {}
        found = calibrate_on(model, create("decoders", name, **settings), records, tokenizer=tiny_tokenizer())
        save_calibration(found, files[-1])
    engine = open_model(path, Serving(context=CONTEXT, calibrations=tuple(files))).engine
    try:
        for name, file in zip(("modes", "rice"), files, strict=True):
            (answer,) = answered(engine, asked(ids_of("abcab"), 8, decoder=made(name, {})))
            expected = decode(model, tiny_tokenizer(), "abcab", name, max_new_tokens=8, calibration=file)
            assert answer.error is None
            assert answer.ids == list(expected.token_ids)
    finally:
        engine.close(0)


def test_every_decoder_of_the_catalogue_is_served_or_refused_in_a_sentence() -> None:
    for name in names("decoders"):
        settings = {"experts": [[0, 0]]} if name == "mask_experts" else {}
        if name in SERVED:
            assert made(name, settings) is not None
            continue
        with pytest.raises(UserError, match=f"^{name} .*cannot be answered token by token.*[^\\n]$"):
            made(name, settings)


def test_log_probabilities_are_of_what_was_drawn_from(engine: Engine) -> None:
    (answer,) = answered(engine, asked(ids_of("abcdef"), 6, decoder=made("scmoe", {}), num_top=64))
    for token in (token for piece in answer.pieces for token in piece.tokens):
        assert token.logprob is not None
        assert all(math.isfinite(one.logprob) for one in token.top)
        assert sum(math.exp(one.logprob) for one in token.top) == pytest.approx(1, abs=1e-4)
        assert token.token == token.top[0].token


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    pytest.importorskip("fastapi")
    from served import Server

    found = Server(SPECIMEN, decoder=made("scmoe", {}))
    yield found
    found.opened.engine.close(0)


def said(server: Any, text: str, name: str, *, chat: bool = False, num: int = 24, **settings: Any) -> str:
    inside = mixtura.load(SPECIMEN)
    found = decode(
        inside, server.opened.tokenizer, text, name, max_new_tokens=num, chat=chat, seed=7, **settings
    )
    return str(found.text)


def test_a_request_or_the_server_chooses(server: Any) -> None:
    text = "Question: What is 17 + 28?"
    body = {"prompt": text, "temperature": 0, "max_tokens": 24}
    masked = {"name": "mask_experts", "settings": {"experts": [[0, 1], [2, 3]]}}
    for more, expected in (
        ({}, said(server, text, "scmoe")),
        ({"decoder": None}, said(server, text, "greedy")),
        ({"decoder": "greedy"}, said(server, text, "greedy")),
        ({"decoder": masked}, said(server, text, "mask_experts", experts=[[0, 1], [2, 3]])),
    ):
        status, answer, _ = server.ask("/v1/completions", body | more)
        assert status == 200, answer
        assert answer["choices"][0]["text"] == expected, more
        events = server.events("/v1/completions", body | more)
        assert "".join(one["choices"][0]["text"] for one in events) == expected
    chat = {"messages": [{"role": "user", "content": "What is 17 + 28?"}], "temperature": 0, "max_tokens": 24}
    status, answer, _ = server.ask("/v1/chat/completions", chat | {"decoder": masked})
    assert status == 200
    expected = said(server, "What is 17 + 28?", "mask_experts", chat=True, experts=[[0, 1], [2, 3]])
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        ("scmo", "did you mean 'scmoe'"),
        ("best_of_n", "best_of_n grows several texts"),
        ("think_router", "means of several tokens"),
        ("rewiring", "computes gradients"),
        ("", "wants a name"),
        ("/etc/passwd", "knows no decoder"),
        ("./evil.py", "knows no decoder"),
        ({"name": "scmoe", "settings": {"beta": -1}}, "beta"),
        ({"name": "scmoe", "settings": {"beta": "x"}}, "beta of Scmoe must be float"),
        ({"name": "scmoe", "settings": {"bet": 1}}, "did you mean 'beta'"),
        ({"name": "scmoe,greedy", "settings": {"beta": 1}}, "settings belong to one"),
        ({"name": "mask_experts", "settings": {"experts": [[0, 99]]}}, "99"),
        ({"name": "rice"}, "--calibration FILE"),
        (5, "decoder"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(server: Any, decoder: Any, words: str) -> None:
    status, answer, _ = server.ask("/v1/completions", {"prompt": "x", "max_tokens": 4, "decoder": decoder})
    assert status == 400, answer
    assert words in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_likelihoods_of_a_prompt_are_not_a_decoders(server: Any) -> None:
    body = {"prompt": "x", "max_tokens": 0, "echo": True, "logprobs": 1}
    assert server.ask("/v1/completions", body)[0] == 400
    assert server.ask("/v1/completions", body | {"decoder": None})[0] == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--decoder", "best_of_n"), "grows several texts"),
        (("--decoder", "scmo"), "did you mean 'scmoe'"),
        (("--decoder", "scmoe", "--set", "beta=-1"), "beta"),
        (("--set", "beta=1"), "--set is for a --decoder"),
        (("--decoder", "modes"), "--calibration FILE"),
        (("--calibration", "missing"), "there is no file missing"),
    ],
)
def test_what_a_server_cannot_do_is_said_at_the_start(arguments: tuple[str, ...], words: str) -> None:
    pytest.importorskip("fastapi")
    done = run_mixtura("serve", "--port", "0", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
