"""What every sparsifier promises."""

from __future__ import annotations

from dataclasses import replace

import torch

from mixtura.authoring.contracts._core import Subject, require
from mixtura.methods.sparsifiers import Masks, Sparsifier, Training

_SHAPES = {"layer.up": (3, 8, 6), "layer.down": (3, 6, 8), "attention": (12, 6)}
_STEPS = 40


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> Training:
    """Two stacks of experts and a matrix, in the middle of a training."""
    del method
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = (
        {name: torch.randn(shape, generator=generator) for name, shape in _SHAPES.items()} for _ in range(2)
    )
    ones = {name: torch.ones(shape, dtype=torch.bool) for name, shape in _SHAPES.items()}
    return Training(weights, gradients, ones, _STEPS // 2, _STEPS)


def use(sparsifier: Sparsifier, training: Training) -> Masks:
    """The masks."""
    return sparsifier.masks(training)


def check_a_mask_for_every_matrix(method: Subject) -> None:
    """From the start on, every matrix has a mask of its shape, also in bfloat16."""
    training, sparsifier = sample(method, 10), method.create()
    half = replace(training, weights={n: w.to(torch.bfloat16) for n, w in training.weights.items()})
    for masks in (sparsifier.start(training.weights), use(sparsifier, training), use(sparsifier, half)):
        require(list(masks) == list(_SHAPES), f"matrices and masks have other names: {list(masks)}")
        for name, mask in masks.items():
            require(
                mask.dtype == torch.bool and mask.shape == _SHAPES[name], f"{name} has no mask of its own"
            )


def check_ever_fewer_weights(method: Subject) -> None:
    """Through a whole training, never more weights are left than before, in the end fewer than at first."""
    sparsifier, training = method.create(), sample(method, 11)
    masks = sparsifier.start(training.weights)
    first = before = _left(masks)
    for step in range(1, _STEPS + 1):
        if not sparsifier.due(step, _STEPS):
            continue
        require(step < _STEPS, "masks change after the last step, when nothing is trained any more")
        weights = {name: weight * masks[name] for name, weight in training.weights.items()}
        masks = use(sparsifier, replace(training, weights=weights, masks=masks, step=step))
        require(_left(masks) <= before, f"after step {step} more weights are left than before")
        before = _left(masks)
    require(0 < before < first, f"of {first} weights {before} are left in the end")


def check_short_trainings_have_their_turn(method: Subject) -> None:
    """In a training of any length from two steps on, masks change at least once."""
    sparsifier = method.create()
    for steps in (2, 3, 17, 400):
        require(any(sparsifier.due(step, steps) for step in range(1, steps)), f"never in {steps} steps")


def check_the_largest_weights_stay(method: Subject) -> None:
    """The largest weight of all is left, be it below zero or above."""
    for sign in (1, -1):
        training = sample(method, 12)
        training.weights["attention"][2, 3] = sign * 100
        require(bool(use(method.create(), training)["attention"][2, 3]), "the largest weight is gone")


def _left(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())
