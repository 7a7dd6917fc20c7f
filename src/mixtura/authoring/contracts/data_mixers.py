"""What every data mixer promises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtura.authoring.contracts._core import Subject, require
from mixtura.methods.data_mixers import DataMixer, Domains, Standing, State, Stretch

_NAMES = ("code", "prose", "tasks")
_ROUNDS, _EVERY = 4, 60


class Pupil(NamedTuple):
    """A training whose losses fall in proportion to what is read: ``helps[i, j]`` is what j does for i."""

    domains: Domains
    helps: Float[Tensor, "G G"]
    losses: Float[Tensor, " G"]

    def after(self, read: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
        """The losses once so many steps of each domain were read."""
        return self.losses - self.helps @ read


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> Pupil:
    """Three domains, which help themselves most."""
    del method
    generator = torch.Generator().manual_seed(seed)
    helps = 1e-3 * (torch.rand(3, 3, generator=generator, dtype=torch.float64) + 2 * torch.eye(3))
    losses = 2 + torch.rand(3, generator=generator, dtype=torch.float64)
    sizes = 1000 * (1 + torch.rand(3, generator=generator, dtype=torch.float64))
    return Pupil(Domains(_NAMES, sizes, _ROUNDS * _EVERY, _EVERY), helps, losses)


def use(mixer: DataMixer, pupil: Pupil) -> list[tuple[float, list[float]]]:
    """Each stretch of a whole training: its steps and shares."""
    return [(one.num_steps, one.weights.tolist()) for one in _trained(mixer, pupil)]


def check_shares_are_whole(method: Subject) -> None:
    """Every stretch has a step at least, and shares of all domains that are not negative and sum to 1."""
    pupil = sample(method, 10)
    for one in _trained(method.create(), pupil):
        require(one.num_steps >= 1, f"a stretch has {one.num_steps} steps")
        weights = one.weights
        require(weights.shape == (len(_NAMES),), f"there must be a share a domain, got {list(weights.shape)}")
        require(weights.dtype == torch.float64, f"shares must be float64, got {weights.dtype}")
        require(bool((weights >= 0).all()), f"a share is negative: {weights.tolist()}")
        require(abs(float(weights.sum()) - 1) < 1e-9, f"shares sum to {float(weights.sum()):.12g}, not 1")


def check_the_state_is_all_it_remembers(method: Subject) -> None:
    """Made again at any decision, with the state as a file keeps it, it decides the same to the last bit."""
    pupil = sample(method, 11)
    whole = _trained(method.create(), pupil)
    again = _trained(method.create(), pupil, renew=method)
    require(len(whole) == len(again), f"{len(again)} stretches in place of {len(whole)}")
    for number, (one, other) in enumerate(zip(whole, again, strict=True)):
        same = one.num_steps == other.num_steps and torch.equal(one.weights, other.weights)
        require(same, f"stretch {number} is another after the state was written and read")


def check_the_order_of_domains_does_not_matter(method: Subject) -> None:
    """Domains in another order have the same shares over the whole training."""
    pupil = sample(method, 12)
    order = torch.tensor([2, 0, 1])
    known = pupil.domains
    names = tuple(_NAMES[place] for place in order.tolist())
    moved = Domains(names, known.num_tokens[order], known.num_steps, known.every)
    other = Pupil(moved, pupil.helps[order][:, order], pupil.losses[order])
    first, second = (_read(_trained(method.create(), one)) for one in (pupil, other))
    require(
        torch.allclose(first[order], second, rtol=1e-6, atol=1e-6),
        f"domains in another order are read for {second.tolist()} steps, not {first[order].tolist()}",
    )


def check_equal_losses_change_nothing(method: Subject) -> None:
    """Where no loss ever moves, an ``online`` mixer reads as much of each domain as of the others."""
    if not method.has("online"):
        return
    pupil = sample(method, 13)
    still = pupil._replace(helps=torch.zeros(3, 3, dtype=torch.float64))
    for losses in (still.losses, torch.full((3,), 2.0, dtype=torch.float64)):
        read = _read(_trained(method.create(), still._replace(losses=losses)))
        equal = torch.full((3,), float(pupil.domains.num_steps) / 3, dtype=torch.float64)
        require(torch.allclose(read, equal), f"losses that stay lead to {read.tolist()} steps of each domain")


def check_what_helps_most_is_read_most(method: Subject) -> None:
    """An ``online`` mixer reads most of a domain that lowers every loss more than the others do."""
    if not method.has("online"):
        return
    pupil = sample(method, 14)
    for place in range(len(_NAMES)):
        helps = torch.full((3, 3), 1e-3, dtype=torch.float64)
        helps[:, place] = 4e-3
        read = _read(_trained(method.create(), pupil._replace(helps=helps)))
        most = int(read.argmax())
        require(most == place, f"{_NAMES[place]} helps most, but {read.tolist()} steps of each were read")


def check_losses_only_where_told(method: Subject) -> None:
    """A mixer with the tag ``schedule`` decides the same whatever the losses are."""
    if not method.has("schedule"):
        return
    first, second = (
        use(method.create(), sample(method, 15)._replace(losses=losses, helps=1e-3 * losses.diag()))
        for losses in _LOSSES
    )
    require(first == second, "a schedule decides by losses")


_LOSSES = (torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([9.0, 0.1, 4.0]).double())


def _read(stretches: Sequence[Stretch]) -> Float[Tensor, " G"]:
    """Steps of each domain."""
    return torch.stack([one.num_steps * one.weights for one in stretches]).sum(0)


def _trained(mixer: DataMixer, pupil: Pupil, renew: Subject | None = None) -> list[Stretch]:
    """The stretches of a training; with ``renew`` by a new method each time, its state read from a file."""
    domains = pupil.domains
    mixer.check(domains)
    state = mixer.start(domains)
    made: list[Stretch] = []
    step = 0
    while step < domains.num_steps:
        losses = pupil.after(_read(made)) if made else pupil.losses
        if renew is not None:
            mixer, state = renew.create(), _written(state)
        state, one = mixer.next(domains, state, Standing(step, losses))
        require(one.num_steps >= 1, f"a stretch has {one.num_steps} steps")
        made.append(Stretch(one.weights, min(one.num_steps, domains.num_steps - step)))
        step += made[-1].num_steps
    return made


def _written(state: State) -> State:
    """A state as it is read from a file."""
    with TemporaryDirectory() as folder:
        save_file(dict(state), Path(folder) / "state.safetensors")
        read: State = load_file(Path(folder) / "state.safetensors")
        return read
