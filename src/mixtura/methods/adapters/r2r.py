"""One LoRA for each domain, chosen by what the frozen layers make of the query."""

from __future__ import annotations

import math
from typing import final

from mixtura.methods.adapters._prompts import PromptExperts
from mixtura.types import Site

METHOD = {
    "paper": 56,
    "title": "R2R: A Route-to-Rerank Post-Training Framework for Multi-Domain Decoder-Only Rerankers",
    "tags": ["changes:linear", "shares:model", "per_prompt", "looks_ahead", "takes_library"],
}


@final
class R2r(PromptExperts):
    """Fine-tune one LoRA for each domain, of which a small router chooses one for each query.

    The router probes the states inside the model: those at the first changed layer of a depth, below which
    nothing is changed, so that it reads what the frozen model makes of the query. It cannot be merged,
    because queries decide.

    Args:
        rank: of each LoRA expert, at least that of a library's.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer, one for each domain.
        probe: the depth at which states are probed and changes begin, as a share of the decoder layers.
        hidden: hidden features of the router.
        task: the expert that all that is learned belongs to; None where the router decides.
        guidance: coefficient of the router's cross-entropy with ``task``.
        seed: of what the parameters start as.

    Shapes:
        Parameters ``a [M, R, cols]`` and ``b [M, rows, R]`` from the depth on; at the model's first site the
        router's two matrices ``[H, D]`` and ``[M, H]``.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.
        UserError: the first site to be changed reads something else than the residual stream.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape, RouterInput
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=3, num_layers=4, matrices=shapes)
        >>> made = R2r(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, made.shares.sum(-1).tolist()
        (torch.Size([4, 3]), [1.0, 1.0, 1.0, 1.0])

    Differences from the paper:
        Written from the abstract. One pass serves for the probe and for the answer, because nothing is
        changed below the probe; the router's form is a choice. Where no ``task`` is given it learns by
        gradients that go past the choice. Masking the entities of a text in training (entity abstraction) is
        the data's business.

    Reference:
        R2R: A Route-to-Rerank Post-Training Framework for Multi-Domain Decoder-Only Rerankers (paper 56,
        abstract).
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        num_experts: int = 3,
        probe: float = 0.5,
        hidden: int = 64,
        task: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            site,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            num_experts=num_experts,
            task=task,
            guidance=guidance,
            hidden=self.within("hidden", hidden, 1, 1 << 20),
            with_base=False,
            first_layer=math.ceil(self.within("probe", probe, 0, 1) * (site.num_layers - 1)),
            seed=seed,
        )
        self.probe, self.hidden = probe, hidden
