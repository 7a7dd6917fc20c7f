"""What differs between releases of transformers is found as the installed one has it, by one module alone."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from typing import Any

import pytest
import torch
import transformers
from families import tiny_model
from torch import nn
from transformers import DynamicCache

from mixtura.machine.releases import (
    CACHE,
    CACHE_NAMES,
    CHECKPOINTING,
    checkpoint_layers,
    given_cache,
    in_order_of,
    logits_weights_choices,
    returned_cache,
    with_cache,
)
from mixtura.methods import PACKAGE_DIR
from mixtura.modeling.family import MixturaConfig, MixturaForCausalLM

OURS = MixturaConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, moe={"router": "top_k"}
)


@pytest.fixture(params=["olmoe", "ours"])
def model(request: pytest.FixtureRequest) -> Any:
    return MixturaForCausalLM(OURS).eval() if request.param == "ours" else tiny_model(request.param)


def test_a_cache_goes_in_and_comes_out(model: Any) -> None:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :6], **with_cache(cache), use_cache=True)
        assert returned_cache(first) is cache
        assert cache.get_seq_length() == 6
        assert CACHE in first
        for name in CACHE_NAMES:
            rest = model(ids[:, 6:], **{name: returned_cache(first)}, use_cache=True).logits
            torch.testing.assert_close(rest, whole[:, 6:])
            cache.crop(-3)


def test_what_is_not_given_is_none() -> None:
    assert given_cache({}) is None
    assert given_cache({CACHE: None}) is None
    assert with_cache(None) == {}
    assert returned_cache(object()) is None


def test_nothing_of_ours_is_announced_to_go(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(3, 60, (1, 5), generator=torch.Generator().manual_seed(0))
    own = transformers.logging.get_logger("transformers")
    once = own.warning_once
    once.cache_clear()
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
            returned_cache(model(ids, use_cache=True))
    finally:
        transformers.logging.disable_propagation()
    said = [str(one.message) for one in warned] + [record.getMessage() for record in caplog.records]
    assert not [text for text in said if "deprecated" in text]


def test_layers_are_computed_again() -> None:
    model: Any = tiny_model("olmoe").train()
    ids = torch.randint(3, 60, (1, 5), generator=torch.Generator().manual_seed(0))
    seen: list[nn.Module] = []
    model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda module, _: seen.append(module))
    checkpoint_layers(model, use_reentrant=False)
    model(ids, labels=ids).loss.backward()
    assert len(seen) == 2
    assert CHECKPOINTING in inspect.signature(transformers.TrainingArguments).parameters


@pytest.mark.parametrize("family", ["aria", "granitemoe", "granitemoehybrid", "mixtral", "deepseek_v3"])
def test_a_routers_output_is_told_apart(family: str) -> None:
    model: Any = tiny_model(family)
    seen: list[tuple[Any, ...]] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("gate", "router"):
            module.register_forward_hook(lambda _module, _given, output: seen.append(output))
    with torch.no_grad():
        model(torch.randint(3, 60, (1, 5), generator=torch.Generator().manual_seed(0)))
    assert seen
    for output in seen:
        logits, weights, choices = logits_weights_choices(output)
        assert choices.dtype in (torch.int32, torch.int64)
        assert weights.is_floating_point()
        assert weights.shape == choices.shape
        assert logits is None or logits.shape[-1] > choices.shape[-1]
        again = in_order_of(output, logits if logits is not None else weights, weights, choices)
        assert [*map(id, again)] == [*map(id, output)]


def test_no_other_part_asks_for_names_of_releases() -> None:
    asked = re.compile(
        r"[\"'](past_key_values|cache_params|gradient_checkpointing|activation_checkpointing)[\"']"
    )
    versions = re.compile(r"transformers\.__version__\s*(<|>|==)|version\.parse|is_transformers_version")
    for path in PACKAGE_DIR.rglob("*.py"):
        if path.name != "releases.py":
            text = path.read_text(encoding="utf-8")
            assert not asked.search(text), path
            assert not versions.search(text), path
