"""LoRA experts for tasks one after the other, which later tasks do not wear away."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from mixtura.methods._drawing import generator_of, normal
from mixtura.methods._precision import exact_logits
from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._curvature import Directions, Standing, evened, held_back, matters
from mixtura.methods.adapters._prompts import prompt_means
from mixtura.methods.adapters._shared import lora_gate_rows, low_rank, site_seed, smallest_side, top_shares
from mixtura.types import Change, Progress, RouterInput, Site

METHOD = {
    "paper": 100,
    "title": "SAME: Stabilized Mixture-of-Experts for Multimodal Continual Instruction Tuning",
    "tags": ["changes:linear", "per_prompt", "looks_ahead", "reads:loads", "reads:moment", "acts_on_steps"],
}


@final
class Same(Adapter):
    """Fine-tune LoRA experts on one task after the other, each training a task, without forgetting.

    The prompt decides which two experts a sequence gets. Three things hold what was learned: the router's
    gradient is evened out along the directions that inputs have; that of the experts is held back along those
    that inputs of earlier tasks had; and experts that are used less than they matter are left as they are. An
    adapter that is trained again goes on to the next task by itself. It cannot be merged, because prompts
    decide.

    Args:
        rank: of each LoRA expert.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer, one for each task to come.
        top_k: experts that a sequence gets, by their mean softmax over its sum.
        directions: of the inputs, those that are kept at most.
        energy: the share of the inputs' squares that the kept ones have.
        damping: of the held back directions; what lies outside them is divided by it.
        warmup: steps before the router's gradient is evened out.
        refresh: steps between two looks at the inputs' directions.
        margin: an expert is left as it is where its use is not so much above what it matters.
        seed: of what the parameters start as.

    Shapes:
        For each expert ``a [R, cols]`` and ``b [rows, R]``; ``gate [M, cols]``. Buffers: of ``seen`` the
        inputs' ``moment [cols, cols]``, this task's ``axes [cols, directions]`` with their ``sizes``, and
        ``past_axes`` and ``past_sizes`` of the tasks before; of ``standing`` ``use`` and ``importance``
        ``[M]``; ``task``.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.

    Example:
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=0, num_layers=4, matrices=shapes)
        >>> made = Same(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, (made.shares > 0).sum(-1).tolist()
        (torch.Size([4, 4]), [2, 2, 2, 2])

    Cost:
        Squares of the input's width in memory at every layer that is changed.

    Differences from the paper:
        Each sequence has a decision of its own, by its prompt, where the code takes one for the whole batch,
        padding included. Directions are scaled by the inverse of their size over the mean size, without a
        smoothing that is left open. What an expert matters is its mean parameter times gradient. Gradients
        are held back along the directions of all earlier tasks, kept as one set. 4 experts of
        rank 8 in all linear layers, where the code has rank 64 in feed-forward layers.

    Reference:
        SAME: Stabilized Mixture-of-Experts for Multimodal Continual Instruction Tuning (paper 100); its code,
        LAMDA-CL/Prism.
    """

    task: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        num_experts: int = 4,
        top_k: int = 2,
        directions: int = 64,
        energy: float = 0.9,
        damping: float = 0.9,
        warmup: int = 10,
        refresh: int = 20,
        margin: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(site)
        shape = site.matrices["weight"]
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.num_experts = self.within("num_experts", num_experts, 1, 1024)
        self.top_k = self.within("top_k", top_k, 1, num_experts)
        self.directions = self.within("directions", directions, 1, 1 << 16)
        self.energy = self.within("energy", energy, 0, 1)
        self.damping = self.within("damping", damping, 1e-6, 1e6)
        self.warmup = self.within("warmup", warmup, 0, 1 << 40)
        self.refresh = self.within("refresh", refresh, 1, 1 << 40)
        self.margin = self.within("margin", margin, -1, 1)
        self.seed = seed
        generator = generator_of(site_seed(site, seed, "weight"))
        drawn = [0.01 * normal(generator, rank, shape.cols) for _ in range(num_experts)]
        self.a = nn.ParameterList(nn.Parameter(one) for one in drawn)
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(shape.rows, rank)) for _ in drawn)
        self.gate = lora_gate_rows(site, num_experts, seed)
        self.seen = Directions(shape.cols, min(directions, shape.cols), energy)
        self.standing = Standing(num_experts)
        self.register_buffer("task", torch.zeros((), dtype=torch.int64))

    def change(self, inputs: RouterInput) -> Change:
        scores = (exact_logits(inputs.x, self.gate) / self.num_experts).softmax(-1)
        means = prompt_means(inputs, scores)
        a, b = torch.stack(list(self.a)), torch.stack(list(self.b))
        part = low_rank(a, b, self.alpha, [self.rank] * self.num_experts)
        # A sequence of whose prompt no token counts gets nothing.
        told = means.sum(-1, keepdim=True) > 0
        shares = (top_shares(torch.where(told, means, 1.0), self.top_k) * told)[inputs.sequences]
        return Change(matrices={"weight": part}, shares=shares, history={"prompt": means})

    def before_step(self, progress: Progress) -> None:
        self._look(progress)
        seen = self.seen
        if self.gate.grad is not None and progress.step >= self.warmup:
            self.gate.grad.copy_(evened(self.gate.grad, seen.axes, seen.sizes))
        for a in self.a:
            if a.grad is not None and self.task > 0:
                a.grad.copy_(held_back(a.grad, seen.past_axes, seen.past_sizes, self.damping))
        for expert in self.frozen():
            self.a[expert].grad = self.b[expert].grad = None
        if progress.step + 1 == progress.num_steps:
            seen.close()
            self.standing.close()
            self.task += 1

    def frozen(self) -> list[int]:
        """The experts that are left as they are: less used than they matter, and not of the task at hand."""
        # Before the second task there is nothing to be lost.
        own = int(self.task) % self.num_experts
        return [e for e in self.standing.behind(self.margin) if e != own] if self.task > 0 else []

    def _look(self, progress: Progress) -> None:
        """Take in what the layer met since the last step."""
        self.seen.see(progress.moment, progress.num_tokens)
        if progress.step % self.refresh == 0:
            self.seen.refresh(progress.step + 1)
        found = [matters([a, b]) for a, b in zip(self.a, self.b, strict=True)]
        self.standing.see(progress.loads, progress.num_tokens, found)
