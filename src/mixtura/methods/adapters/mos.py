"""LoRA from shards of pools that all layers share."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mixtura.errors import SettingError
from mixtura.methods._drawing import generator_of
from mixtura.methods.adapters._prompts import Joined
from mixtura.methods.adapters._shared import low_rank, site_seed, smallest_side
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": 73,
    "title": "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
    "tags": ["changes:linear", "shares:role", "mergeable", "expands_to_lora"],
}


@final
class Mos(Joined):
    """Fine-tune a LoRA of a high rank with the parameters of a low one: its rows are shards of shared pools.

    The layers of one role (all query projections, say) have a pool for ``a`` and one for ``b``. Each layer
    draws its shards at the start, for the two matrices apart, and has a few of its own besides. What it
    learns is plain LoRA, can be merged and be written for PEFT and servers.

    Args:
        rank: of every layer's LoRA, or as high as the pools of few layers allow.
        alpha: what is learned is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        budget: the rank at which plain LoRA would have as many parameters.
        shards: into how many a row is cut.
        private: of the rank, how much of each layer is its own.
        seed: of what ``a`` starts as, and of the draw.

    Shapes:
        At the first layer of a role with P layers, ``pool_a [budget * P * shards, cols / shards]`` and
        ``pool_b [budget * P * shards, rows / shards]``; at each the buffers ``ids_a`` and ``ids_b``
        ``[rank * shards]``.

    Raises:
        SettingError: the sides of the matrix do not divide by ``shards``, or a setting is out of range.

    Example:
        >>> from mixtura.types import MatrixShape
        >>> shapes, peers = {"weight": MatrixShape(6, 4)}, ("0.q", "1.q", "2.q")
        >>> site = Site(name="0.q", kind="linear", layer=0, num_layers=3, matrices=shapes, peers=peers)
        >>> made = Mos(site, rank=3, budget=2, shards=2)
        >>> made.change(RouterInput.of(torch.eye(4))).matrices["weight"].a.shape, made.pool_a.shape
        (torch.Size([1, 3, 4]), torch.Size([12, 2]))

    Differences from the paper:
        Rank 8 at the cost of 2 by default, half a shard's length and one private row; its experiments have
        several such. Pools are by role and size.

    Reference:
        MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards (paper 73); its
        code, Forence1999/MoS.
    """

    ids_a: Int[Tensor, " N"]
    ids_b: Int[Tensor, " N"]

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        budget: int = 2,
        shards: int = 2,
        private: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(site)
        shape, count = site.matrices["weight"], max(len(site.peers), 1)
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.budget = self.within("budget", budget, 1, smallest_side(site.matrices))
        self.shards = self.within("shards", shards, 1, smallest_side(site.matrices))
        self.private = self.within("private", private, 0, min(rank, budget))
        self.seed = seed
        if shape.rows % shards or shape.cols % shards:
            raise SettingError(
                f"shards of Mos must divide the sides of {site.name}, {shape.rows} and {shape.cols}, "
                f"got {shards}"
            )
        pooled = (budget - private) * shards * count
        self.rank_here = min(rank, private + (budget - private) * count)
        drawn = (self.rank_here - private) * shards
        for name, length in (("a", shape.cols // shards), ("b", shape.rows // shards)):
            generator = generator_of(site_seed(site, seed, name))
            shared = torch.randperm(pooled, generator=generator, device=generator.device)[:drawn]
            first = pooled + site.place * private * shards
            own = torch.arange(first, first + private * shards, device=generator.device)
            self.register_buffer(f"ids_{name}", torch.cat([own, shared]))
            if site.place == 0:
                pool = torch.zeros(pooled + count * private * shards, length, device=generator.device)
                if name == "a":
                    pool.uniform_(-1.0, 1.0, generator=generator).mul_(shape.cols**-0.5)
                self.register_parameter(f"pool_{name}", nn.Parameter(pool))

    def change(self, inputs: RouterInput) -> Change:
        del inputs
        a = (
            self.first.get_parameter("pool_a")
            .to(self.ids_a.device)[self.ids_a]
            .reshape(1, self.rank_here, -1)
        )
        b = (
            self.first.get_parameter("pool_b")
            .to(self.ids_b.device)[self.ids_b]
            .reshape(1, self.rank_here, -1)
        )
        return Change(matrices={"weight": low_rank(a, b.mT, self.alpha, [self.rank_here])})
