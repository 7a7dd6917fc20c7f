"""Requests that name an adapter and a decoder get what `generate` makes with both."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_helpers import answered, asked
from tiny_checkpoints import run_mixtura, save_tiny, tiny_tokenizer

import mixtura
from mixtura.data.tokens import encode_text
from mixtura.errors import UserError
from mixtura.methods import create
from mixtura.methods.decoders import Branch, Decoder, LayerFacts, Prompt, View
from mixtura.running.adapters import with_adapter
from mixtura.running.decoders.calibrating import calibrate_on
from mixtura.running.decoders.entry import decode
from mixtura.running.decoders.probing import save_calibration
from mixtura.running.tiers.opening import Wish
from mixtura.serving.engine.deciding import require_served
from mixtura.serving.engine.loop import Engine
from mixtura.serving.engine.records import Sampling
from mixtura.serving.opening import Serving, open_model
from mixtura.types.steering import Steering

peft = pytest.importorskip("peft")

# Of the decoder in this file.
METHOD = {"tags": ["steers"]}
CONTEXT = 64
METHODS: dict[str, dict[str, Any]] = {
    "expert_lora": {"rank": 2},
    "esft": {"experts": [0, 2]},
    "lora_mixer": {"rank": 2},
}
# Two views, experts left out, draws, layers left out, and the model as it is.
DECODERS: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("greedy", {}, 0.0),
    ("scmoe", {}, 0.0),
    ("mask_experts", {"experts": [[1, 1], [2, 2]]}, 0.0),
    ("sampling", {}, 0.7),
    ("layer_skipping", {}, 0.0),
)
RECORDS = [("abc", "de", ""), ("fgh", "ab", ""), ("cde", "hg", "")]


def save_adapter(model: Path, folder: Path, **config: Any) -> Path:
    """An adapter that changes much, its routers too where it has some."""
    method = config.pop("method", folder.name)
    made = mixtura.AdapterConfig(method=method, settings=METHODS[method], task_type="CAUSAL_LM", **config)
    adapted = peft.get_peft_model(mixtura.load(model), made)
    generator = torch.Generator().manual_seed(len(folder.name))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.3)
    adapted.save_pretrained(folder)
    return folder


def made(name: str, settings: Mapping[str, Any]) -> Any:
    return require_served([create("decoders", name, **settings)])


def texts(num: int) -> list[str]:
    draw = random.Random(1)
    return ["".join(draw.choice("abcdefgh ") for _ in range(draw.randrange(3, 30))) for _ in range(num)]


@lru_cache(maxsize=32)
def opened(model: Path, adapter: Path | None) -> Any:
    found = mixtura.load(model)
    return found if adapter is None else with_adapter(found, adapter).get_base_model()


def alone(
    model: Path, adapter: Path | None, text: str, name: str | Decoder, temperature: float = 0.0, **more: Any
) -> list[int]:
    found = decode(
        opened(model, adapter), tiny_tokenizer(), text, name, max_new_tokens=10, temperature=temperature,
        seed=3, **more,
    )  # fmt: skip
    return list(found.token_ids)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {method: save_adapter(path, root / method) for method in METHODS}


def check_all_pairs(engine: Engine, path: Path, adapters: Mapping[str, Path]) -> list[list[int]]:
    """Every decoder with every adapter and with none, all in the engine at once."""
    pairs = list(product([None, *adapters], DECODERS))
    requests, expected = [], []
    for text, (adapter, (name, settings, temperature)) in zip(texts(len(pairs)), pairs, strict=True):
        ids = encode_text(text, tiny_tokenizer())
        sampling = Sampling(temperature=temperature, seed=3)
        requests.append(asked(ids, 10, sampling=sampling, adapter=adapter, decoder=made(name, settings)))
        folder = None if adapter is None else adapters[adapter]
        expected.append(alone(path, folder, text, name, temperature, **settings))
    found = answered(engine, *requests)
    for pair, answer, ids in zip(pairs, found, expected, strict=True):
        assert answer.error is None, pair
        assert answer.ids == ids, pair
    assert engine.prefixes.running_bytes == 0
    return expected


@pytest.mark.parametrize("memory", [None, Wish(pool_slots=4)])
def test_all_pairs_at_once(path: Path, adapters: dict[str, Path], memory: Wish | None) -> None:
    serving = Serving(context=CONTEXT, running=32, cache_bytes=4 << 20, adapters=adapters, memory=memory)
    engine = open_model(path, serving).engine
    try:
        check_all_pairs(engine, path, adapters)
        # Texts of several adapters and decoders took steps in one pass.
        assert engine.counts.step_rows > 3 * engine.counts.steps
    finally:
        engine.close(0)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_families(family: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", family)
    chosen = {name: save_adapter(path, tmp_path / name) for name in ("expert_lora", "esft")}
    engine = open_model(path, Serving(context=CONTEXT, running=32, adapters=chosen)).engine
    try:
        check_all_pairs(engine, path, chosen)
    finally:
        engine.close(0)


def test_one_text_differs_by_adapter_and_by_decoder(path: Path, adapters: dict[str, Path]) -> None:
    text = "abcdefgh" * 5
    masked = {"experts": [[0, 1], [0, 2], [1, 2], [1, 3]]}
    ids = encode_text(text, tiny_tokenizer())
    engine = open_model(path, Serving(context=CONTEXT, running=8, adapters=adapters)).engine
    try:
        found = set()
        for adapter in (None, *adapters):
            for decoder in (None, made("mask_experts", masked)):
                first, second = (
                    answered(engine, asked(ids, 10, adapter=adapter, decoder=decoder))[0] for _ in range(2)
                )
                # What was read with one pair is kept for that pair alone.
                assert (first.num_cached, second.num_cached) == (0, len(ids) - 1)
                assert first.ids == second.ids
                found.add(tuple(first.ids))
        assert len(found) > 4
    finally:
        engine.close(0)


def test_adapters_with_routers_of_their_own(path: Path, tmp_path: Path) -> None:
    chosen = {
        name: save_adapter(path, tmp_path / name, method="expert_lora", train_router=True)
        for name in ("one", "three")
    }
    engine = open_model(path, Serving(context=CONTEXT, running=32, adapters=chosen)).engine
    try:
        assert not engine.passes.mixes
        check_all_pairs(engine, path, chosen)
    finally:
        engine.close(0)


class _Favourites(Decoder):
    """Leaves out, in every layer, the expert that the prompt's last token likes best."""

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        seen = prompt.probe.run(prompt.token_ids).probabilities

        def steer(layer: LayerFacts) -> Steering:
            allowed = torch.ones(layer.num_experts, dtype=torch.bool)
            allowed[seen[layer.index][-1].argmax()] = False
            return Steering(allowed=allowed)

        return (Branch(views=(View(prompt.facts.steer_all(steer)),)),)


def test_a_decoder_that_runs_the_prompt_first_runs_it_with_the_adapter(
    path: Path, adapters: dict[str, Path]
) -> None:
    engine = open_model(path, Serving(context=CONTEXT, running=8, adapters=adapters)).engine
    try:
        text, names = "abcabd fg", [None, *adapters]
        ids = encode_text(text, tiny_tokenizer())
        requests = [asked(ids, 10, adapter=name, decoder=_Favourites()) for name in names]
        for name, answer in zip(names, answered(engine, *requests), strict=True):
            assert answer.error is None
            folder = None if name is None else adapters[name]
            assert answer.ids == alone(path, folder, text, _Favourites()), name
    finally:
        engine.close(0)


def test_routers_of_its_own_want_a_calibration_of_its_own(path: Path, tmp_path: Path) -> None:
    adapter = save_adapter(path, tmp_path / "own", method="expert_lora", train_router=True)
    files = []
    for place, model in enumerate((mixtura.load(path), opened(path, adapter))):
        found = calibrate_on(model, create("decoders", "modes"), RECORDS, tokenizer=tiny_tokenizer())
        files.append(tmp_path / f"{place}.safetensors")
        save_calibration(found, files[-1])
    ids = encode_text("abcab", tiny_tokenizer())
    asking = [asked(ids, 10, adapter=name, decoder=made("modes", {})) for name in (None, "own")]

    def engine_with(*calibrations: Path, **more: Any) -> Engine:
        serving = Serving(context=CONTEXT, adapters={"own": adapter}, calibrations=calibrations, **more)
        return open_model(path, serving).engine

    engine = engine_with(files[0])
    try:
        plain, refused = answered(engine, *asking)
        assert plain.error is None
        assert "that own was merged into" in str(refused.error)
    finally:
        engine.close(0)
    with pytest.raises(UserError, match=r"made for another model.*own was merged into"):
        engine_with(files[0], decoder=made("modes", {}))
    engine = engine_with(*files, decoder=made("modes", {}))
    try:
        for answer, folder, file in zip(answered(engine, *asking), (None, adapter), files, strict=True):
            assert answer.error is None
            assert answer.ids == alone(path, folder, "abcab", "modes", calibration=file)
    finally:
        engine.close(0)


def test_over_http_as_generate_says_it(path: Path, adapters: dict[str, Path]) -> None:
    pytest.importorskip("fastapi")
    from served import Server

    masked = {"name": "mask_experts", "settings": {"experts": [[0, 1], [1, 2]]}}
    server = Server(path, context=CONTEXT, adapters=adapters, decoder=made("scmoe", {}))
    try:
        body = {"prompt": "abcdef gh", "temperature": 0, "max_tokens": 8, "model": "esft"}
        said = {}
        for key, more in (
            ("scmoe", {}),
            ("mask_experts", {"decoder": masked}),
            ("greedy", {"decoder": None}),
        ):
            status, answer, _ = server.ask("/v1/completions", body | more)
            assert status == 200, answer
            assert answer["model"] == "esft"
            said[key] = answer["choices"][0]["text"]
        for name, settings in (("scmoe", {}), ("mask_experts", masked["settings"]), ("greedy", {})):
            assert isinstance(settings, dict)
            expected = decode(
                opened(path, adapters["esft"]), server.opened.tokenizer, "abcdef gh", name,
                max_new_tokens=8, **settings,
            )  # fmt: skip
            assert said[name] == expected.text, name
    finally:
        server.opened.engine.close(0)
    done = run_mixtura(
        "generate", str(path), "abcdef gh", "--adapter", str(adapters["esft"]), "--unmerged", "--decoder",
        "scmoe", "--max-new-tokens", "8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == said["scmoe"]
