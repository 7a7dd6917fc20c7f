"""Experts that live in a store, and observers of what experts do."""

from __future__ import annotations

import pytest
import torch
from expert_layouts import LAYOUTS, ROUNDED, batch, experts_module, relative_error, with_implementation
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.kernels import ExpertTensors
from mixtura.kernels.backend import parameters_of


class Shelf:
    """A store that makes each expert anew and notes which were asked for."""

    def __init__(self, module: nn.Module) -> None:
        self.source = parameters_of(module)
        self.num_experts = self.source.num_experts
        self.asked: list[tuple[int, torch.dtype]] = []

    def get(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        self.asked.append((expert, dtype))
        made = [
            None if value is None else value.detach().to(dtype, copy=True)
            for value in self.source.get(expert, dtype)
        ]
        up, down, up_bias, down_bias = made
        assert up is not None
        assert down is not None
        return ExpertTensors(up, down, up_bias, down_bias)


class Notes:
    """An observer that keeps everything it is told."""

    def __init__(self) -> None:
        self.started: list[tuple[Tensor, Tensor, Tensor]] = []
        self.seen: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
        self.finished = 0

    def start(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        self.started.append((hidden, top_k_index, top_k_weights))

    def expert(
        self, expert: int, token_ids: Tensor, weights: Tensor, inputs: Tensor, outputs: Tensor
    ) -> None:
        self.seen.append((expert, token_ids.clone(), weights.clone(), inputs.clone(), outputs.clone()))

    def finish(self) -> None:
        self.finished += 1


def _with_store(module: nn.Module) -> tuple[nn.Module, Shelf]:
    """The module as a loader leaves it: no parameters of experts, a store instead."""
    twin = with_implementation(module, "mixtura").requires_grad_(False)
    shelf = Shelf(module)
    for name in ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
        if hasattr(twin, name):
            delattr(twin, name)
    twin.mixtura_store = shelf
    return twin, shelf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_store_gives_what_parameters_give(layout: str, dtype: torch.dtype) -> None:
    module = experts_module(layout, dtype).requires_grad_(False)
    hidden, ids, weights = batch(module, dtype=dtype)
    ids = ids.masked_fill(ids == 2, 6)
    ids[:3, 1] = -1
    stored, shelf = _with_store(module)
    found = stored(hidden, ids, weights)
    assert found.grad_fn is None
    tolerance = 1e-5 if dtype == torch.float64 and layout in ROUNDED else 20 * torch.finfo(dtype).eps
    assert relative_error(found, module(hidden, ids, weights)) < tolerance
    touched = sorted({expert for expert in ids.flatten().tolist() if 0 <= expert < 6})
    assert shelf.asked == [(expert, dtype) for expert in touched]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ROUNDED])
def test_inputs_of_stored_experts_get_gradients(layout: str) -> None:
    module = experts_module(layout).requires_grad_(False)
    hidden, ids, weights = batch(module)
    ids[2, 0] = 6
    stored, _ = _with_store(module)
    grads = []
    for one in (module, stored):
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        one(x, ids, w).pow(2).sum().backward()
        assert x.grad is not None
        assert w.grad is not None
        grads.append((x.grad, w.grad))
    for found, expected in zip(grads[1], grads[0], strict=True):
        assert relative_error(found, expected) < 1e-11
    assert grads[1][1][2, 0] == 0


def test_training_stored_experts_is_refused_and_running_them_is_not() -> None:
    module = experts_module("post_norm")
    stored, _ = _with_store(module)
    stored.post_expert_norm.requires_grad_(True)
    hidden, ids, weights = batch(module)
    outputs = stored(hidden, ids, weights)
    assert relative_error(outputs, module(hidden, ids, weights)) < 1e-5
    with pytest.raises(UserError, match="cannot be trained"):
        outputs.sum().backward()


@pytest.mark.parametrize("mode", ["inference", "training", "store", "store_with_grad"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_an_observer_sees_every_assignment_once(layout: str, mode: str) -> None:
    module = experts_module(layout).requires_grad_(mode == "training")
    running = _with_store(module)[0] if mode.startswith("store") else module
    hidden, ids, weights = batch(module)
    hidden.requires_grad_(mode == "store_with_grad")
    ids = ids.masked_fill(ids == 2, 6)
    ids[:3, 1] = -1
    expected = running(hidden, ids, weights)
    notes = Notes()
    running.mixtura_observer = notes
    outputs = running(hidden, ids, weights)
    assert relative_error(outputs, expected) < (1e-5 if layout in ROUNDED else 1e-12)
    ((start_hidden, start_ids, start_weights),) = notes.started
    assert start_hidden is hidden
    assert torch.equal(start_ids, ids)
    assert torch.equal(start_weights, weights)
    assert notes.finished == 1
    pairs = [(expert, token) for expert, tokens, *_ in notes.seen for token in tokens.tolist()]
    routed = [(e, t) for t, row in enumerate(ids.tolist()) for e in row if 0 <= e < 6]
    assert len(pairs) == len(set(pairs))
    assert sorted(pairs) == sorted(routed)
    _check_what_was_seen(with_implementation(module, "eager"), notes, hidden.detach(), ids, weights)


def _check_what_was_seen(
    eager: nn.Module, notes: Notes, hidden: Tensor, ids: Tensor, weights: Tensor
) -> None:
    for expert, tokens, seen_weights, inputs, outputs in notes.seen:
        assert not inputs.requires_grad
        assert not outputs.requires_grad
        assert torch.equal(inputs, hidden[tokens])
        position = (ids[tokens] == expert).int().argmax(dim=1)
        assert torch.equal(seen_weights, weights[tokens, position])
        alone = torch.full((tokens.shape[0], 1), expert)
        with torch.no_grad():
            truth = eager(inputs, alone, torch.ones(tokens.shape[0], 1, dtype=inputs.dtype))
        assert relative_error(outputs, truth) < 1e-5


def test_an_observer_of_an_empty_batch_is_told_so() -> None:
    module = experts_module("default")
    notes = Notes()
    module.mixtura_observer = notes
    module(*batch(module, 0))
    assert (len(notes.started), len(notes.seen), notes.finished) == (1, 0, 1)
