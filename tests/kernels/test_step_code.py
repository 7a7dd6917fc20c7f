"""Code and numbers exchanged between steps: what a step was found from is never taken for the present."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_model
from family_sizes import SIZES
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from whole_steps import assert_same_steps, generated, ids_of, ready_pair, started, step

from mixtura.kernels import quicken, using


@pytest.fixture
def ready() -> tuple[Any, Any]:
    return ready_pair()


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its first result made larger."""

    def changed(*given: Any, **named: Any) -> Any:
        first, *others = function(*given, **named)
        return 1.5 * first, *others

    return changed


CODE: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "a class's forward": lambda model: (type(model.model.layers[0].self_attn), "forward"),
    "what an attention finds in its module": lambda model: (
        sys.modules[type(model.model.layers[0].self_attn).__module__], "apply_rotary_pos_emb"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CODE)
def test_code_exchanged_between_steps_is_heeded(
    ready: tuple[Any, Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = CODE[what](ready[0])
    own = getattr(owner, name)

    def change(model: Any) -> None:
        monkeypatch.setattr(owner, name, scaled(own))

    ids = ids_of(2, 12)
    found = []
    for model, mode in ((ready[0], "torch"), (ready[1], "fast")):
        monkeypatch.setattr(owner, name, own)
        with torch.no_grad(), using(mode):
            cache = started(model, ids[:, :6])
            logits = [step(model, ids[:, 6:7], cache)]
            change(model)
            logits += [step(model, ids[:, t : t + 1], cache) for t in range(7, 12)]
        found.append(torch.cat(logits, dim=1))
    assert torch.allclose(*found, atol=1e-5)


def test_an_attention_registered_between_steps_is_heeded(ready: tuple[Any, Any]) -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ids = ids_of(2, 9)
    found = []
    try:
        for model, mode in ((ready[0], "torch"), (ready[1], "fast")):
            ALL_ATTENTION_FUNCTIONS["sdpa"] = own
            with torch.no_grad(), using(mode):
                cache = started(model, ids[:, :6])
                first = step(model, ids[:, 6:7], cache)
                ALL_ATTENTION_FUNCTIONS["sdpa"] = scaled(own)
                found.append(torch.cat([first, *(step(model, ids[:, t : t + 1], cache) for t in (7, 8))]))
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    assert torch.allclose(*found, atol=1e-5)


def test_corrections_that_were_zero_are_heeded_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """With zeros, correcting scores for the choice alone is the same as correcting the weights, too."""
    for name in ("n_group", "topk_group"):
        monkeypatch.setitem(SIZES, name, 1)
    plain: Any = tiny_model("glm4_moe", dtype=torch.float32)
    gates = [layer.mlp.gate for layer in plain.model.layers if hasattr(layer.mlp, "gate")]
    own = type(gates[0]).forward

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        logits, weights, choices = own(self, *given, **named)
        return logits, weights + self.e_score_correction_bias[choices], choices

    monkeypatch.setattr(type(gates[0]), "forward", forward)
    for gate in gates:
        gate.e_score_correction_bias.data.zero_()
    plain.set_experts_implementation("mixtura")
    quick = copy.deepcopy(plain)
    quicken(quick)

    def change(model: Any) -> None:
        for name, tensor in model.named_buffers():
            if "correction" in name:
                tensor.data.copy_(torch.rand(tensor.shape, generator=generated(3)) * 0.5)

    assert any("correction" in name for name, _ in plain.named_buffers())
    assert_same_steps(plain, quick, change)
