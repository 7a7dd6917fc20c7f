"""What every allocator promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mixtura.authoring.contracts._core import Subject, require
from mixtura.methods.allocators import Allocator, ExpertsSeen

_LAYERS, _EXPERTS = 3, 6
_BITS = (16.0, 8.1, 4.2, 3.1, 2.1)


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> ExpertsSeen:
    """Three layers of six experts, whose errors grow fourfold with every bit less."""
    del method
    rng = np.random.default_rng(seed)
    number = _LAYERS * _EXPERTS
    loads = rng.integers(1, 100, number)
    bits = np.array(_BITS)
    costs = np.where(bits == bits[0], 0.0, 4.0**-bits)
    return ExpertsSeen(
        np.repeat(np.arange(_LAYERS), _EXPERTS),
        loads,
        loads * rng.uniform(0.1, 1.0, number),
        bits,
        rng.uniform(0.5, 2.0, number)[:, None] * costs,
    )


def use(allocator: Allocator, seen: ExpertsSeen) -> Float[ndarray, "M O"]:
    """The losses."""
    return allocator.losses(seen)


def check_one_loss_for_every_way(method: Subject) -> None:
    """A finite loss, no less than 0, for each way of storing each expert."""
    seen = sample(method, 10)
    losses = use(method.create(), seen)
    require(losses.shape == seen.errors.shape, f"there must be a loss a way, got {list(losses.shape)}")
    require(bool(np.isfinite(losses).all() and (losses >= 0).all()), "losses must be finite and not negative")


def check_fewer_bits_lose_no_less(method: Subject) -> None:
    """Where fewer bits make a larger error, they have no smaller loss; an expert as it is has the least."""
    losses = use(method.create(), sample(method, 11))
    require(bool((np.diff(losses, axis=1) >= 0).all()), f"fewer bits lose less: {losses[0].tolist()}")


def check_places_do_not_matter(method: Subject) -> None:
    """Experts in another order have the same losses."""
    seen = sample(method, 12)
    order = np.random.default_rng(12).permutation(len(seen.layers))
    moved = ExpertsSeen(
        seen.layers[order], seen.loads[order], seen.weights[order], seen.bits, seen.errors[order]
    )
    found, wanted = use(method.create(), moved), use(method.create(), seen)[order]
    require(np.allclose(found, wanted, rtol=1e-9), "experts in another order have other losses")


def check_experts_that_were_never_chosen(method: Subject) -> None:
    """Where an expert, a layer or all of them were never chosen, every loss is still a number."""
    seen = sample(method, 13)
    for gone in (seen.layers * 0 + np.arange(len(seen.layers)) == 2, seen.layers == 1, seen.layers >= 0):
        given = replace(
            seen,
            loads=np.where(gone, 0, seen.loads),
            weights=np.where(gone, 0.0, seen.weights),
            errors=np.where(gone[:, None], 0.0, seen.errors),
        )
        with np.errstate(all="ignore"):
            losses = use(method.create(), given)
        require(
            bool(np.isfinite(losses).all()), "experts that were never chosen have losses that are no numbers"
        )
