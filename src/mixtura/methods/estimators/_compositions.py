"""Attributes of objects: what an object is, what it is like, and words that stand for both together."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods.estimators._networks import Passed, dense_routing, perceptron

# Of cosines, when the likeliest is looked for.
TEMPERATURE: Final = 0.1


def likeness(a: Float[Tensor, "n W"], b: Float[Tensor, "m W"]) -> Float[Tensor, "n m"]:
    """The cosine of each of the first with each of the second."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def partners(target: Int[Tensor, "n 2"], frequency: Float[Tensor, " A"]) -> Int[Tensor, " n"]:
    """For each row another with the same object, drawn so that rare attributes come as often as others.

    A row whose object no other row has is its own partner.
    """
    same = target[:, None, 1] == target[None, :, 1]
    same &= ~torch.eye(len(target), dtype=torch.bool)
    odds = same.double() / frequency[target[:, 0]]
    alone = ~same.any(1)
    odds[alone, alone.nonzero()[:, 0]] = 1.0
    return torch.multinomial(odds, 1)[:, 0]


@final
class Guided(nn.Module):
    """A map of features whose channels and places the object says to look at: ``f + g s``, ``g = f c``."""

    def __init__(self, width: int, d_object: int) -> None:
        super().__init__()
        self.channels = perceptron(d_object + width, max(1, (d_object + width) // 2), width)
        self.places = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, f: Float[Tensor, "n C H W"], thing: Float[Tensor, "n D"]) -> Float[Tensor, "n C H W"]:
        """The map with what belongs to the object's attribute raised."""
        chosen = self.channels(torch.cat([thing, f.mean((2, 3))], dim=1)).sigmoid()
        g = f * chosen[:, :, None, None]
        mean = thing.mean(1)[:, None, None].expand_as(g[:, 0])
        raised: Tensor = f + g * self.places(torch.stack([mean, g.mean(1)], dim=1)).sigmoid()
        return raised


@final
class Composer(nn.Module):
    """Two experts of a picture, the object's and the attribute's, and words that compose to pairs."""

    def __init__(self, grid: tuple[int, int], num_attributes: int, num_objects: int, width: int) -> None:
        super().__init__()
        self.grid, channels = grid, (1, width, width, width, width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))
        self.thing = nn.Linear(width, width)
        self.guides = nn.ModuleList(Guided(width, width) for _ in range(3))
        self.manner = nn.Linear(3 * width, width)
        self.both = perceptron(2 * width, width, width)
        self.attributes = nn.Parameter(torch.randn(num_attributes, width))
        self.objects = nn.Parameter(torch.randn(num_objects, width))
        self.compose = perceptron(2 * width, 2 * width, width)
        self.seen: Bool[Tensor, "A O"]
        self.frequency: Float[Tensor, " A"]
        self.register_buffer("seen", torch.zeros(num_attributes, num_objects, dtype=torch.bool))
        self.register_buffer("frequency", torch.ones(num_attributes))

    def looked(self, x: Float[Tensor, "n D"]) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors of the object, of the attribute and of both."""
        f, maps = x.reshape(len(x), 1, *self.grid), []
        for layer in self.layers:
            f = layer(f).relu()
            maps.append(f)
        thing = self.thing(maps.pop().mean((2, 3)))
        guided = [guide(f, thing).mean((2, 3)) for guide, f in zip(self.guides, maps, strict=True)]
        manner = self.manner(torch.cat(guided, dim=1))
        return thing, manner, self.both(torch.cat([thing, manner], dim=1))

    def words(self) -> Float[Tensor, "P W"]:
        """The vectors of all pairs, the attribute's the slower."""
        num_attributes, num_objects = self.seen.shape
        attributes = self.attributes.repeat_interleave(num_objects, dim=0)
        made: Tensor = self.compose(torch.cat([self.objects.repeat(num_attributes, 1), attributes], dim=1))
        return made

    def mixed_loss(self, both: Float[Tensor, "n W"], target: Int[Tensor, "n 2"]) -> Float[Tensor, ""]:
        """How far mixtures of two pictures of one object are from the words of the mixed attribute.

        One of two: it stands against all pairs that were learned, less the two that were mixed.
        """
        other = partners(target, self.frequency)
        share = torch.rand(()).to(both)
        seen = share * both + (1 - share) * both[other]
        attribute = share * self.attributes[target[:, 0]] + (1 - share) * self.attributes[target[other, 0]]
        meant = self.compose(torch.cat([self.objects[target[:, 1]], attribute], dim=1))
        wrong = self.seen.flatten().repeat(len(both), 1)
        rows, num_objects = torch.arange(len(both)), self.seen.shape[1]
        for mixed in (target, target[other]):
            wrong[rows, mixed[:, 0] * num_objects + mixed[:, 1]] = False
        right = F.cosine_similarity(seen, meant)[:, None]
        against = likeness(seen, self.words()).masked_fill(~wrong, -torch.inf)
        logits = torch.cat([right, against], dim=1) / TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(len(both), dtype=torch.long))


@final
class ComposedPairs(nn.Module):
    """How alike rows are to every attribute, every object and every pair of the two."""

    def __init__(self, composer: Composer, unseen: float) -> None:
        super().__init__()
        self.composer, self.unseen = composer, unseen

    def forward(self, x: Float[Tensor, "n D"]) -> Passed:
        net = self.composer
        thing, manner, both = net.looked(x)
        things, manners = likeness(thing, net.objects), likeness(manner, net.attributes)
        pairs, seen = likeness(both, net.words()), net.seen.flatten()
        sums = (manners[:, :, None] + things[:, None]).flatten(1) + pairs + self.unseen * ~seen
        best = torch.stack([one.amax(1) for one in (things, manners, pairs)], dim=1)
        routing = dense_routing(torch.full_like(best, 1 / 3), best)
        return Passed(output=sums, routing=routing, more=(things, manners, pairs, seen, both))


def pairs_of(y: np.ndarray, num_rows: int) -> np.ndarray:
    """Pairs of an attribute and an object, one a row.

    Raises:
        UserError: they are something else.
    """
    if y.shape != (num_rows, 2):
        raise UserError(f"y of Cot is {num_rows} rows of an attribute and an object, got {y.shape}")
    return y


def plain(column: np.ndarray) -> np.ndarray:
    """A column of objects as the whole numbers that they are, if so: beside words numbers are objects."""
    if column.dtype.kind == "O" and all(isinstance(one, int | np.integer) for one in column):
        return np.array(column.tolist())
    return column
