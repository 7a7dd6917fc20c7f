"""What every trimmer promises."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mixtura.authoring.contracts._core import Subject, require
from mixtura.methods.trimmers import NeuronsSeen, Trimmer

_D, _F = 6, 10


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> NeuronsSeen:
    """An expert of ten neurons; gradients where the method's tags ask for them."""
    generator = torch.Generator().manual_seed(seed)
    squares, pulls = (torch.rand(_F, generator=generator) + 0.1 for _ in range(2))
    down = torch.randn(_D, _F, generator=generator)
    return NeuronsSeen(squares, down, pulls if method.has("reads:gradients") else None)


def use(trimmer: Trimmer, seen: NeuronsSeen) -> Tensor:
    """The scores."""
    return trimmer.scores(seen)


def check_one_number_per_neuron(method: Subject) -> None:
    """One finite number for each neuron, also in bfloat16."""
    seen = sample(method, 10)
    for given in (seen, replace(seen, down=seen.down.to(torch.bfloat16))):
        scores = use(method.create(), given)
        require(scores.shape == (_F,), f"there must be one score a neuron, got {list(scores.shape)}")
        require(scores.dtype == torch.float32, f"scores must be float32, got {scores.dtype}")
        require(torch.isfinite(scores).all(), "scores must be finite")


def check_places_do_not_matter(method: Subject) -> None:
    """Neurons in another order have the same scores (not for the tag ``label_dependent``)."""
    if method.has("label_dependent"):
        return
    seen = sample(method, 11)
    order = torch.randperm(_F, generator=torch.Generator().manual_seed(11))
    pulls = None if seen.pulls is None else seen.pulls[order]
    moved = NeuronsSeen(seen.squares[order], seen.down[:, order], pulls)
    require(
        torch.allclose(use(method.create(), moved), use(method.create(), seen)[order]),
        "neurons in another order have other scores",
    )


def check_neurons_that_never_fire_go_first(method: Subject) -> None:
    """A neuron that puts out nothing on any token has the least score (not for ``label_dependent``)."""
    if method.has("label_dependent"):
        return
    seen = sample(method, 12)
    dead = seen.squares.clone()
    dead[3] = 0.0
    scores = use(method.create(), replace(seen, squares=dead))
    require(int(scores.argmin()) == 3, f"the neuron that never fires has no least score: {scores.tolist()}")


def check_more_active_counts_no_less(method: Subject) -> None:
    """A neuron that fires more, all else alike, has no smaller score."""
    seen = sample(method, 13)
    louder = seen.squares.clone()
    louder[5] *= 9.0
    before = use(method.create(), seen)[5]
    after = use(method.create(), replace(seen, squares=louder))[5]
    require(bool(after >= before), f"a neuron that fires more has the score {after:.4g}, before {before:.4g}")
