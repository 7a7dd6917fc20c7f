"""Rectified flows by a small transformer over patches, whose feed-forward layers may be experts."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators._networks import Passed, SwiGlu, routed, router, told
from mixtura.types import Routing

# How far a bias moves after a batch that left its expert more or less than its share.
_BIAS_STEP = 1e-3


def rotated(x: Float[Tensor, "n h s d"], places: Int[Tensor, "s 2"]) -> Float[Tensor, "n h s d"]:
    """Queries or keys turned by their patch's row, in one half, and by its column, in the other."""
    quarter = x.shape[-1] // 4
    speeds = 100.0 ** -(torch.arange(quarter, dtype=x.dtype) / quarter)
    made = []
    for axis, part in enumerate(x.chunk(2, dim=-1)):
        angles = places[:, axis, None].to(x.dtype) * speeds
        a, b = part.chunk(2, dim=-1)
        made += [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()]
    return torch.cat(made, dim=-1)


@final
class SparseLayer(nn.Module):
    """Fine-grained experts chosen by sigmoid scores, beside a shared one; balanced without a loss."""

    bias: Tensor

    def __init__(self, owner: Any, seed: int) -> None:
        super().__init__()
        wide, num = owner.d_model, owner.num_experts
        self.gate = router("deepseek_v3", wide, num, seed, top_k=owner.top_k)
        self.experts = nn.ModuleList(SwiGlu(wide, owner.d_expert) for _ in range(num))
        self.shared = SwiGlu(wide, owner.d_expert)
        self.register_buffer("bias", torch.zeros(num))

    def forward(self, x: Float[Tensor, "T D"]) -> tuple[Float[Tensor, "T D"], Routing]:
        """The rows after the layer, and who had them."""
        routing = self.gate(told(x, self.training, selection_bias=self.bias.float()))
        if self.training:
            load = routing.load.to(self.bias.dtype)
            self.bias += _BIAS_STEP * torch.sign(load.mean() - load)
        return routed(self.experts, x, routing, x.shape[1]) + self.shared(x), routing


@final
class FlowBlock(nn.Module):
    """Attention and a feed-forward layer, shifted, scaled and gated by a condition; at first the identity."""

    def __init__(self, owner: Any, sparse: bool, seed: int) -> None:
        super().__init__()
        wide = owner.d_model
        self.num_heads = owner.num_heads
        self.mixes, self.joins = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        width = owner.d_expert * (owner.top_k + 1)
        self.inner = SparseLayer(owner, seed) if sparse else SwiGlu(wide, width)
        self.condition = nn.Linear(wide, 6 * wide)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(
        self, h: Float[Tensor, "n s D"], c: Float[Tensor, "n D"], places: Int[Tensor, "s 2"]
    ) -> tuple[Float[Tensor, "n s D"], Routing | None]:
        """The patches after the block."""
        parts = self.condition(F.silu(c))[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_inner, scale_inner, gate_inner = parts
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        q, k, v = (
            one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in self.mixes(x).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(rotated(q, places), rotated(k, places), v)
        h = h + gate * self.joins(seen.transpose(1, 2).flatten(2))
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale_inner) + shift_inner
        routing = None
        if isinstance(self.inner, SparseLayer):
            made, routing = self.inner(x.flatten(0, 1))
            made = made.reshape(h.shape)
        else:
            made = self.inner(x)
        return h + gate_inner * made, routing


@final
class Flow(nn.Module):
    """The speed at which noise turns into rows of a class, at a time between 0 (noise) and 1 (rows)."""

    def __init__(self, grid: tuple[int, int], side: int, num_classes: int, owner: Any) -> None:
        super().__init__()
        wide = owner.d_model
        self.grid, self.side = grid, side
        self.reads, self.writes = nn.Linear(side * side, wide), nn.Linear(wide, side * side)
        self.times = nn.Sequential(nn.Linear(2, wide), nn.SiLU(), nn.Linear(wide, wide))
        # The last one is that of no class.
        self.classes = nn.Embedding(num_classes + 1, wide)
        self.blocks = nn.ModuleList(
            FlowBlock(owner, layer % 2 == 1, owner.random_state + layer) for layer in range(owner.num_layers)
        )
        nn.init.zeros_(self.writes.weight)
        nn.init.zeros_(self.writes.bias)

    def forward(
        self, z: Float[Tensor, "n d"], time: Float[Tensor, " n"], labels: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n d"], Routing | None]:
        """The speed, and the last routing of patches."""
        (high, wide), side = self.grid, self.side
        tiles = z.reshape(len(z), high, side, wide, side).transpose(2, 3).reshape(len(z), high * wide, -1)
        places = torch.cartesian_prod(torch.arange(high), torch.arange(wide)).reshape(-1, 2)
        c = self.times(torch.stack([time, 1 - time], dim=1)) + self.classes(labels)
        h, routing = self.reads(tiles), None
        for block in self.blocks:
            h, found = block(h, c, places)
            routing = routing if found is None else found
        made = self.writes(F.layer_norm(h, h.shape[-1:]))
        made = made.reshape(len(z), high, wide, side, side).transpose(2, 3).reshape(z.shape)
        return made, routing


@final
class Explaining(nn.Module):
    """How far a flow errs on the way to rows under each class, as logits."""

    noise: Tensor
    times: Tensor

    def __init__(self, flow: Flow, d_in: int, num_classes: int, owner: Any) -> None:
        super().__init__()
        self.flow, self.num_classes = flow, num_classes
        # The same ways for all rows, so that none depends on the others.
        self.register_buffer("noise", torch.randn(owner.num_probes, d_in))
        self.register_buffer("times", (torch.arange(owner.num_probes) + 0.5) / owner.num_probes)

    def forward(self, x: Float[Tensor, "T D"]) -> Passed:
        """A logit a class, and the last routing of patches."""
        errors, routing = torch.zeros(len(x), self.num_classes, dtype=x.dtype), None
        for noise, time in zip(self.noise, self.times, strict=True):
            z = time * x + (1 - time) * noise
            for label in range(self.num_classes):
                labels = torch.full((len(x),), label)
                speed, routing = self.flow(z, time.expand(len(x)), labels)
                errors[:, label] += (speed - (x - noise)).square().sum(1)
        assert routing is not None
        return Passed(output=-errors / len(self.times), routing=routing)
