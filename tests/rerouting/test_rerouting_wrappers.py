"""Whatever wraps a model or a part of it, views, routers, balancers, recordings and traces find the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rerouted import ADAPTED, logits_of, model_of, texts, with_adapters
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mixtura
from mixtura.checkpoints.viewing.wrappers import plain_model
from mixtura.data.tokens import TokenBatch
from mixtura.errors import UnsupportedModelError, UserError

IDS = texts(3, 8)
BATCH = {"input_ids": IDS}
TOKENS = TokenBatch(IDS, torch.ones_like(IDS), torch.zeros(3, dtype=torch.long), ("text",))


class Inside(nn.Module):
    """A module of somebody's own around a model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, model)
        self._name = name

    def forward(self, **given: Any) -> Any:
        return getattr(self, self._name)(**given)


def _layers(wrap: Callable[[nn.Module], nn.Module], part: str = "") -> Callable[[Any], Any]:
    def wrapped(model: Any) -> Any:
        for number, layer in enumerate(model.model.layers):
            if part:
                layer.mlp.add_module(part, wrap(layer.mlp.get_submodule(part)))
            else:
                model.model.layers[number] = wrap(layer)
        return model

    return wrapped


def compiled(module: nn.Module) -> nn.Module:
    made: Any = torch.compile(module, backend="eager")
    assert isinstance(made, nn.Module)
    return made


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "several devices": nn.DataParallel,
    "somebody's own": lambda model: Inside(model, "policy"),
    "twice": lambda model: Inside(compiled(with_adapters(model, started=False)), "module"),
    "layers checkpointed": _layers(checkpoint_wrapper),
    "experts checkpointed": _layers(checkpoint_wrapper, "experts"),
} | {
    f"adapters on {where}": lambda model, where=where: with_adapters(model, where, started=False)  # type: ignore[misc]
    for where in ADAPTED
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
def test_what_wraps_a_model_is_looked_through(wrapper: str) -> None:
    plain = model_of("qwen3_moe")
    model = WRAPPERS[wrapper](model_of("qwen3_moe")).eval()
    names = [layer.name for layer in mixtura.open_model(plain).layers]
    assert [layer.name for layer in mixtura.open_model(model).layers] == names
    expected = mixtura.observe(plain, TOKENS, progress=False)
    made = mixtura.observe(model, TOKENS, progress=False)
    for one, other in zip(made.layers, expected.layers, strict=True):
        assert torch.equal(one.counts, other.counts)
        torch.testing.assert_close(one.weight_sums, other.weight_sums)
    for one in (plain, model):
        mixtura.set_router(one, "top_p", p=0.4)
    torch.testing.assert_close(logits_of(model, BATCH), logits_of(plain, BATCH))
    for one in (plain, model):
        mixtura.restore(one)
        mixtura.balance(one.train(), "switch_loss", coefficient=1.0)
    losses = [one(**BATCH, labels=IDS).loss for one in (plain, model)]
    torch.testing.assert_close(*losses)


@pytest.mark.slow
def test_what_was_compiled_and_run_before_is_changed_and_observed() -> None:
    # Elsewhere, where no types are checked: what checks them here cannot be traced.
    path = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(path / "rerouting_compiled.py")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(path), str(path.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_adapters_that_have_learned_are_observed_with_the_model() -> None:
    adapted = with_adapters(model_of("qwen3_moe"), "experts").eval()
    seen: list[int] = []
    layer = adapted.get_base_model().model.layers[0].mlp
    layer.gate.register_forward_hook(lambda m, a, output: seen.extend(output[2].flatten().tolist()))
    trace = mixtura.observe(adapted, TOKENS, progress=False)
    assert trace.layers[0].counts[0].tolist() == torch.bincount(torch.tensor(seen), minlength=8).tolist()


def test_one_of_several_models_has_to_be_named() -> None:
    both = nn.ModuleDict({"student": model_of("qwen3_moe"), "teacher": model_of("mixtral")})
    with pytest.raises(UserError, match=r"ModuleDict holds 2 models \(student, teacher\)"):
        mixtura.open_model(both)
    # A model without experts beside it cannot be meant.
    config = LoraConfig(r=2, target_modules=["q_proj"])
    both["teacher"] = get_peft_model(model_of("mixtral"), config).base_model.model.lm_head
    assert plain_model(both) is both["student"]
    with pytest.raises(UnsupportedModelError, match="Qwen3MoeDecoderLayer is no model of transformers"):
        mixtura.open_model(both["student"].model.layers[0])
    with pytest.raises(UnsupportedModelError):
        mixtura.set_router(nn.Linear(2, 2), "top_k")
