"""Several decoders as one: a steering with a search, a contrast with samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods import declared_tags
from mixtura.methods.decoders import Branch, Candidate, Decoder, Head, Prompt, View
from mixtura.running.decoders.steering import merged

# What only one of several may do.
ALONE = ("soften", "force", "revise", "ends_step", "choose", "select", "leave")


def tags_of(decoders: Sequence[Decoder]) -> frozenset[str]:
    """The tags of all."""
    return frozenset().union(*(declared_tags(type(one)) for one in decoders))


def name_of(decoder: Decoder) -> str:
    """What a decoder is asked for by."""
    return type(decoder).__module__.rpartition(".")[2]


def parts_of(decoder: Decoder) -> tuple[Decoder, ...]:
    """The decoders that one is made of, or it alone."""
    return decoder.decoders if isinstance(decoder, Composed) else (decoder,)


def composed(decoders: Sequence[Decoder]) -> Decoder:
    """One decoder that does what all do.

    Raises:
        UserError: two of them decide the same thing.
    """
    return decoders[0] if len(decoders) == 1 else Composed(decoders)


@final
class Composed(Decoder):
    """Each branch of each decoder with each branch of the others; views, likewise, within a branch.

    Attributes:
        decoders: those that it is made of.
    """

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self.decoders = tuple(decoders)
        self._owners: dict[str, Decoder] = {}
        # How many views each has; the same in every branch.
        self._sizes: tuple[int, ...] = ()
        for name in ALONE:
            owners = [one for one in decoders if getattr(type(one), name) is not getattr(Decoder, name)]
            if len(owners) > 1:
                said = " and ".join(type(one).__name__ for one in owners)
                raise UserError(f"{said} cannot be combined: both say how to {name.replace('_', ' ')}")
            if owners:
                self._owners[name] = owners[0]

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        made = [Branch()]
        sizes = []
        for decoder in self.decoders:
            own = decoder.open(prompt)
            sizes.append(len(own[0].views))
            made = [self._both(first, second) for first in made for second in own]
        self._sizes = tuple(sizes)
        return tuple(made)

    def mix(self, logits: Float[Tensor, "B W V"], candidates: Sequence[Candidate]) -> Float[Tensor, "B V"]:
        made = logits.view(len(logits), *self._sizes, -1)
        for decoder, size in zip(reversed(self.decoders), reversed(self._sizes), strict=True):
            vocabulary = made.shape[-1]
            rest = made.shape[1:-2]
            flat = made.reshape(len(logits), -1, size, vocabulary)
            mixed = [decoder.mix(flat[:, place], candidates) for place in range(flat.shape[1])]
            made = torch.stack(mixed, dim=1).view(len(logits), *rest, vocabulary)
        return made

    def soften(
        self, probabilities: Float[Tensor, "B V"], candidates: Sequence[Candidate]
    ) -> tuple[Bool[Tensor, " B"], Float[Tensor, "B V"]] | None:
        return self._owner("soften").soften(probabilities, candidates)

    def force(self, candidate: Candidate) -> tuple[int, ...]:
        return self._owner("force").force(candidate)

    def revise(self, candidate: Candidate) -> Branch | None:
        return self._owner("revise").revise(candidate)

    def ends_step(self, candidate: Candidate) -> bool:
        return self._owner("ends_step").ends_step(candidate)

    def choose(self, candidates: Sequence[Candidate]) -> Sequence[int]:
        return self._owner("choose").choose(candidates)

    def select(self, candidates: Sequence[Candidate]) -> int:
        return self._owner("select").select(candidates)

    def leave(self, layer: int, hidden: Float[Tensor, " D"], head: Head, candidate: Candidate) -> bool:
        return self._owner("leave").leave(layer, hidden, head, candidate)

    def _owner(self, name: str) -> Decoder:
        return self._owners.get(name, _PLAIN)

    def _both(self, first: Branch, second: Branch) -> Branch:
        if first.forced and second.forced:
            raise UserError("decoders that both begin the answer with words of theirs cannot be combined")
        temperature = first.temperature if second.temperature is None else second.temperature
        state: Any = first.state if second.state is None else second.state
        return Branch(
            views=tuple(self._merged(a, b) for a in first.views for b in second.views),
            temperature=temperature,
            forced=first.forced or second.forced,
            state=state,
        )

    def _merged(self, first: View, second: View) -> View:
        names = " and ".join(type(one).__name__ for one in self.decoders)
        try:
            steering = merged(first.steering, second.steering)
        except ValueError as error:
            raise UserError(f"{names} cannot be combined: they steer the same ({error})") from None
        steered = [view for view in (first, second) if view.steering]
        if len({view.since for view in steered}) > 1 or (first.model and second.model):
            raise UserError(f"{names} cannot be combined: they steer different tokens or models")
        return View(
            steering,
            since=steered[0].since if steered else "prompt",
            skipped=first.skipped | second.skipped,
            model=first.model or second.model,
        )


@final
class _Plain(Decoder):
    """Does nothing of its own."""

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        del prompt
        return (Branch(),)


_PLAIN = _Plain()
