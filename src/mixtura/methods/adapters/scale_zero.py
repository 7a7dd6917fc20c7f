"""LoRAs that are added one after the other as training goes on."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._shared import site_seed, smallest_side, thin_pair
from mixtura.types import Change, LowRank, Progress, RouterInput, Site

METHOD = {
    "paper": 34,
    "title": "One Model for All Tasks: Leveraging Efficient World Models in Multi-Task Planning",
    "tags": ["changes:linear", "mergeable", "acts_on_steps"],
}


@final
class ScaleZero(Adapter):
    """Fine-tune in stages, each with a LoRA of its own, beside what the stages before have learned and keep.

    For many tasks that are learned one after the other (dynamic parameter scaling): of stage s the LoRA
    number s learns, and how much of the base and of the earlier LoRAs is used: ``a0 W + sum of a_j s B_j
    A_j``. What earlier stages learned is not written over. The stages are even parts of the steps; an adapter
    that is trained again goes on with its last LoRA.

    Args:
        rank: of each stage's LoRA.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_stages: stages, of one LoRA each.
        reach: how far from 1 the factors of the base and of the LoRAs can move.
        seed: of what ``a`` starts as.

    Shapes:
        For each stage ``a [1, R, cols]`` and ``b [1, rows, R]``; ``theta`` one for the base and one for each
        stage, of factors ``1 + reach * tanh(theta)``. The buffer ``stage``.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=0, num_layers=1, matrices=shapes)
        >>> made = ScaleZero(site, rank=2, num_stages=3)
        >>> made.before_step(Progress(step=50, num_steps=100))
        >>> made.stage.item(), made.change(RouterInput.of(torch.eye(4))).matrices["weight"].scale.tolist()
        (1, [8.0, 8.0, 0.0])

    Differences from the paper:
        Stages go by the steps, not by which of the tasks are solved, which a text does not say. The method's
        mixture of experts inside the world model is not part of it. ``a`` starts as LoRA's does, where its
        code has normal numbers of deviation 0.01; 3 stages of rank 8, where it has 5 of rank 64.

    Reference:
        One Model for All Tasks (ScaleZero, paper 34); its code, opendilab/LightZero.
    """

    stage: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        num_stages: int = 3,
        reach: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(site)
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.num_stages = self.within("num_stages", num_stages, 1, 1024)
        self.reach = self.within("reach", reach, 0, 1)
        self.seed = seed
        drawn = [
            thin_pair(site, "weight", [rank], site_seed(site, seed, f"stage {stage}"))
            for stage in range(num_stages)
        ]
        self.a = nn.ParameterList(a for a, _ in drawn)
        self.b = nn.ParameterList(b for _, b in drawn)
        self.theta = nn.Parameter(torch.zeros(1 + num_stages))
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))

    def change(self, inputs: RouterInput) -> Change:
        del inputs
        factors = 1 + self.reach * self.theta.tanh()
        begun = torch.arange(self.num_stages, device=factors.device) <= self.stage
        scale = factors[1:] * begun * (self.alpha / self.rank)
        part = LowRank(torch.cat(list(self.a)), torch.cat(list(self.b)), scale)
        return Change(matrices={"weight": part}, base_scale=factors[0])

    def before_step(self, progress: Progress) -> None:
        # The gradients are of the stage that the passes ran in; the next step's passes run in its own.
        stage = int(self.stage)
        for number in range(self.num_stages):
            if number != stage:
                self.a[number].grad = self.b[number].grad = None
        if self.theta.grad is not None:
            # Of the base and the stages before; in the first one there are none.
            kept = torch.arange(1 + self.num_stages, device=self.theta.device) < (stage + 1) * (stage > 0)
            self.theta.grad.mul_(kept)
        reached = (progress.step + 1) * self.num_stages // max(progress.num_steps, 1)
        # Trained again, it stays in its last stage, so that all that was learned is in use.
        self.stage.fill_(max(stage, min(reached, self.num_stages - 1)))
