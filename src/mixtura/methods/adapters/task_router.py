"""One LoRA for each task, or the model as it was, chosen by the embeddings of the input."""

from __future__ import annotations

from typing import final

from mixtura.methods.adapters._prompts import PromptExperts
from mixtura.types import Site

METHOD = {
    "paper": 72,
    "title": "Dynamic Routing Between Experts: A Data-Efficient Approach to Continual Learning in "
    "Vision-Language Models",
    "tags": ["changes:linear", "shares:model", "per_prompt", "looks_ahead", "takes_library"],
}


@final
class TaskRouter(PromptExperts):
    """Fine-tune one LoRA for each task, and send each input to one of them or to the base as it was.

    For tasks that come one after the other (continual learning) without forgetting: what the router gives to
    the base gets its very bits, and no task needs another one's data. It cannot be merged, because inputs
    decide.

    Args:
        rank: of each LoRA expert, at least that of a library's.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer, one for each task.
        task: the expert that all that is learned belongs to, -1 for the base; None where the router decides.
        guidance: coefficient of the router's cross-entropy with ``task``.
        seed: of what the parameters start as.

    Shapes:
        Parameters ``a [M, R, cols]`` and ``b [M, rows, R]``; at the model's first site the router's matrix
        ``[1 + M, D]``, whose first row is the base's.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.
        UserError: the first site to be changed reads something else than the residual stream.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape, RouterInput
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=0, num_layers=4, matrices=shapes)
        >>> made = TaskRouter(site, rank=2, task=1).change(RouterInput.of(torch.eye(4), training=True))
        >>> made.shares[0].tolist(), list(made.losses)
        ([0.0, 1.0, 0.0], ['task'])

    Differences from the paper:
        Written from the abstract, which has images in the input; here it is the mean of the prompt at the
        first changed layer, one norm behind the embeddings. Where no ``task`` is given the router learns by
        gradients that go past the choice.

    Reference:
        Dynamic Routing Between Experts: A Data-Efficient Approach to Continual Learning in Vision-Language
        Models (paper 72, abstract).
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        num_experts: int = 3,
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
            hidden=0,
            with_base=True,
            first_layer=0,
            seed=seed,
        )
