"""LoRA on a model's experts whose ranks grow where the task asks for it."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._growing import give, growths_left, importance_of
from mixtura.methods.adapters._prompts import Joined
from mixtura.methods.adapters._shared import register_pairs, smallest_side
from mixtura.types import Change, LowRank, Progress, RouterInput, Site

METHOD = {
    "paper": 54,
    "title": "DR-LoRA: Dynamic Rank LoRA for Mixture-of-Experts Adaptation",
    "tags": [
        "changes:experts",
        "shares:model",
        "mergeable",
        "expands_to_lora",
        "reads:loads",
        "acts_on_steps",
    ],
}


@final
class DrLora(Joined):
    """Fine-tune a mixture-of-experts model by LoRA on its experts, with ranks that grow where they matter.

    All begin at half the rank. In the first part of training the experts of the whole model whose saliency is
    highest, how much they are used times how much their ranks matter to the loss, get more, up to twice the
    rank, until the mean of all is ``rank``. Growing changes nothing at the moment it happens.

    Args:
        rank: mean rank in the end.
        alpha: what is learned is scaled by it over ``rank``.
        dropout: share of features that the thin matrices do not see in training.
        interval: steps between two growths; where fewer steps grow, there is one growth at their end.
        growing: the share of the steps in which ranks grow.
        decay: of the moving averages that saliency is made of.
        seed: of what ``a`` starts as.

    Shapes:
        ``up_a [E, 2 R, D]``, ``up_b [E, rows, 2 R]``, ``down_a [E, 2 R, F]`` and ``down_b [E, D, 2 R]``; the
        buffers ``ranks``, ``use`` and ``importance`` ``[E]``.

    Raises:
        SettingError: twice ``rank`` is not in [2, the smallest side of a matrix], or another is out of range.

    Example:
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"up": MatrixShape(8, 4), "down": MatrixShape(4, 4)}
        >>> site = Site(name="experts", kind="experts", layer=0, num_layers=1, matrices=shapes, num_experts=3)
        >>> made = DrLora(site, rank=2, interval=5)
        >>> made.join(made)
        >>> loads = torch.tensor([3.0, 0.0, 1.0])
        >>> for step in range(10):
        ...     made.before_step(Progress(step=step, num_steps=10, loads=loads, num_tokens=4))
        >>> made.ranks.tolist()
        [2, 2, 2]

    Differences from the paper:
        Written from the abstract. Saliency is the plain product of two moving averages: an expert's share of
        the weights, and the mean of parameter times gradient over its ranks. Ranks grow one at a time, evenly
        spaced growths that spend the budget exactly; where the first of them begin and where they may end are
        choices. Memory for twice the rank is held from the start.

    Reference:
        DR-LoRA: Dynamic Rank LoRA for Mixture-of-Experts Adaptation (paper 54, abstract).
    """

    ranks: Tensor
    use: Tensor
    importance: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        interval: int = 100,
        growing: float = 0.5,
        decay: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__(site)
        self.rank = self.within("rank", rank, 1, max(smallest_side(site.matrices) // 2, 1))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.interval = self.within("interval", interval, 1, 1 << 40)
        self.growing = self.within("growing", growing, 0, 1)
        self.decay = self.within("decay", decay, 0, 1)
        self.seed = seed
        self._members: list[DrLora] = []
        count, self.widest = site.num_experts, min(2 * rank, smallest_side(site.matrices))
        register_pairs(self, site.matrices, [self.widest] * count, seed)
        self.register_buffer("ranks", torch.full((count,), max(rank // 2, 1)))
        for name in ("use", "importance"):
            self.register_buffer(name, torch.zeros(count))

    def join(self, first: Adapter) -> None:
        super().join(first)
        assert isinstance(first, DrLora)
        if not any(one is self for one in first._members):
            first._members.append(self)

    def change(self, inputs: RouterInput) -> Change:
        del inputs
        held = torch.arange(self.widest, device=self.ranks.device) < self.ranks[:, None]
        scale = torch.full((self.site.num_experts,), self.alpha / self.rank, dtype=torch.float64)
        made = {
            name: LowRank(a * held[:, :, None], b * held[:, None], scale)
            for name, (a, b) in zip(self.site.matrices, self._parts(), strict=True)
        }
        return Change(matrices=made, expert_ids=tuple(range(self.site.num_experts)))

    def before_step(self, progress: Progress) -> None:
        if progress.loads is not None:
            share = progress.loads / max(progress.num_tokens, 1)
            self.use.lerp_(share.to(self.use), 1 - self.decay)
        self.importance.lerp_(importance_of(self._parts(), self.ranks).to(self.importance), 1 - self.decay)
        first = self.first
        # Once all layers have been told.
        if isinstance(first, DrLora) and first._members and self is first._members[-1]:
            growths = growths_left(progress.step, progress.num_steps, self.interval, self.growing)
            if growths:
                first.grow(growths)

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        part = self.get_parameter
        return [(part(f"{name}_a"), part(f"{name}_b")) for name in self.site.matrices]

    def grow(self, growths: int) -> None:
        """Give the most salient experts of the model one rank more each, of so many growths the first."""
        # A model may lie on several devices.
        saliency = torch.cat([(one.use * one.importance).cpu() for one in self._members])
        ranks = torch.cat([one.ranks.cpu() for one in self._members])
        left = self.rank * len(ranks) - int(ranks.sum())
        grown = give(ranks, saliency, -(-left // growths), self.widest)
        for one, own in zip(
            self._members, grown.split([len(one.ranks) for one in self._members]), strict=True
        ):
            one.ranks.copy_(own)
