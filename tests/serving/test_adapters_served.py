"""Requests that choose adapters get what each adapter gives alone, whatever runs beside them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_helpers import GREEDY, answered, asked
from tiny_checkpoints import run_mixtura, save_tiny

import mixtura
from mixtura.errors import CheckpointError, UnsupportedModelError, UserError
from mixtura.running.adapters import with_adapter
from mixtura.running.generation import new_tokens
from mixtura.running.tiers.opening import Wish
from mixtura.serving.engine.loop import Engine
from mixtura.serving.opening import Serving, open_model

peft = pytest.importorskip("peft")

CONTEXT = 64
# Low ranks on experts, experts' own matrices, LoRA experts that tokens choose, low ranks on linear layers.
METHODS: dict[str, dict[str, Any]] = {
    "expert_lora": {"rank": 2},
    "esft": {"experts": [0, 2]},
    "lora_mixer": {"rank": 2},
    "lora": {"rank": 2},
}


def save_adapter(model_path: Path, folder: Path, config: Any) -> Path:
    """An adapter that changes much."""
    adapted = peft.get_peft_model(mixtura.load(model_path), config)
    generator = torch.Generator().manual_seed(len(folder.name))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter), alpha=0.3)
            del name
    adapted.save_pretrained(folder)
    return folder


def ours(method: str, **more: Any) -> Any:
    return mixtura.AdapterConfig(method=method, settings=METHODS[method], task_type="CAUSAL_LM", **more)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {method: save_adapter(path, root / method, ours(method)) for method in METHODS}


def engine_with(path: Path, adapters: Mapping[str, Path], **more: Any) -> Engine:
    return open_model(path, Serving(context=CONTEXT, running=8, adapters=adapters, **more)).engine


@lru_cache(maxsize=16)
def opened(path: Path, adapter: Path | None) -> Any:
    model = mixtura.load(path)
    return model if adapter is None else with_adapter(model, adapter).get_base_model()


def alone(path: Path, adapter: Path | None, prompt: list[int], num: int = 10) -> list[int]:
    return new_tokens(opened(path, adapter), torch.tensor(prompt), max_new_tokens=num).tolist()


def prompts(num: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, 60) for _ in range(draw.randrange(2, 30))] for _ in range(num)]


def check_mixed(engine: Engine, path: Path, adapters: Mapping[str, Path]) -> None:
    names = [None, *adapters]
    texts = prompts(2 * len(names))
    requests = [
        asked(text, 10, adapter=names[place % len(names)], sampling=GREEDY)
        for place, text in enumerate(texts)
    ]
    found = answered(engine, *requests)
    for place, (text, answer) in enumerate(zip(texts, found, strict=True)):
        name = names[place % len(names)]
        assert answer.error is None
        assert answer.ids == alone(path, None if name is None else adapters[name], text), name


def test_all_in_one_batch(path: Path, adapters: dict[str, Path]) -> None:
    engine = engine_with(path, adapters)
    try:
        assert engine.passes.mixes
        check_mixed(engine, path, adapters)
        assert engine.counts.step_rows > 4 * engine.counts.steps
        text = prompts(1)[0]
        made = {name: alone(path, folder, text) for name, folder in adapters.items()}
        # They do differ, so that a mix-up would show.
        assert len({tuple(ids) for ids in made.values()}) > 2
    finally:
        engine.close(0)


def test_what_was_read_with_one_is_not_taken_for_another(path: Path, adapters: dict[str, Path]) -> None:
    engine = engine_with(path, adapters)
    prompt = list(range(3, 43))
    try:
        for name in (None, "esft", "lora"):
            (first,) = answered(engine, asked(prompt, 4, adapter=name))
            (second,) = answered(engine, asked(prompt, 4, adapter=name))
            assert (first.num_cached, second.num_cached) == (0, len(prompt) - 1)
            assert first.ids == second.ids
    finally:
        engine.close(0)


@pytest.mark.parametrize("kind", ["peft", "router"])
def test_those_that_do_not_mix_run_side_by_side_all_the_same(path: Path, tmp_path: Path, kind: str) -> None:
    made = {}
    for name in ("one", "three"):
        if kind == "peft":
            config: Any = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        else:
            config = ours("expert_lora", train_router=name == "three")
        made[name] = save_adapter(path, tmp_path / name, config)
    engine = engine_with(path, made)
    try:
        assert not engine.passes.mixes
        check_mixed(engine, path, made)
    finally:
        engine.close(0)


def test_on_a_model_that_runs_from_disk(path: Path, adapters: dict[str, Path]) -> None:
    engine = engine_with(path, adapters, memory=Wish(pool_slots=4))
    try:
        assert engine.passes.mixes
        check_mixed(engine, path, adapters)
    finally:
        engine.close(0)


def test_adapters_of_two_types_are_refused(path: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    other = save_adapter(path, tmp_path / "other", config)
    with pytest.raises(UserError, match="one model takes adapters of one type"):
        engine_with(path, {"esft": adapters["esft"], "other": other})
    with pytest.raises(CheckpointError, match="not an adapter"):
        engine_with(path, {"none": tmp_path})


def test_the_model_of_a_request_says_which(path: Path, adapters: dict[str, Path]) -> None:
    pytest.importorskip("fastapi")
    from served import Server

    server = Server(path, context=CONTEXT, adapters=adapters)
    try:
        listed = server.ask("/v1/models")[1]["data"]
        assert [one["id"] for one in listed] == ["tiny", *adapters]
        assert listed[1]["parent"] == "tiny"
        tokenizer = server.opened.tokenizer
        ids = tokenizer("abc def", add_special_tokens=True)["input_ids"]
        for name in (None, "tiny", *adapters):
            body = {"prompt": ids, "temperature": 0, "max_tokens": 8, "model": name}
            status, answer, _ = server.ask("/v1/completions", body)
            assert status == 200
            assert answer["model"] == (name or "tiny")
            made = alone(path, adapters.get(name or ""), ids, 8)
            assert answer["choices"][0]["text"] == tokenizer.decode(made, skip_special_tokens=True)
        status, answer, _ = server.ask("/v1/completions", {"prompt": "x", "model": "esf"})
        assert status == 404
        assert "did you mean 'esft'" in answer["error"]["message"]
    finally:
        server.opened.engine.close(0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--adapter", "a", "--adapter", "b"), "--adapter NAME=a"),
        (("--adapter", "a=x", "--adapter", "a=y"), "a name of its own"),
        (("--adapter", "a=missing"), "there is no directory missing"),
    ],
)
def test_what_cannot_be_chosen_is_said(arguments: tuple[str, ...], said: str) -> None:
    done = run_mixtura("serve", "--port", "0", *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_experts_of_dense_parts_run_beside_the_model_as_it_is(tmp_path: Path) -> None:
    # The first layer of this family is dense.
    dense = save_tiny(tmp_path / "dense", "deepseek_v3")
    config = mixtura.AdapterConfig(method="mix_lora", settings={"rank": 2}, task_type="CAUSAL_LM")
    adapter = save_adapter(dense, tmp_path / "mix_lora", config)
    engine = engine_with(dense, {"mix": adapter})
    try:
        check_mixed(engine, dense, {"mix": adapter})
        text = prompts(1)[0]
        assert alone(dense, adapter, text) != alone(dense, None, text)
    finally:
        engine.close(0)


def test_adapters_that_decide_by_whole_prompts_are_refused(path: Path, tmp_path: Path) -> None:
    config = mixtura.AdapterConfig(method="mi_lora", settings={"rank": 2}, task_type="CAUSAL_LM")
    adapter = save_adapter(path, tmp_path / "mi_lora", config)
    with pytest.raises(UnsupportedModelError, match="MiLora decides by the whole prompt, and a server reads"):
        open_model(path, Serving(context=CONTEXT, adapters={"one": adapter}))
