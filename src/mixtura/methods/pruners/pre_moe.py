"""Pruning for a task by router logits, the task found by a prompt's own."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods.pruners import Pruner
from mixtura.methods.pruners._shared import keep_best
from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

METHOD = {
    "paper": 202,
    "title": "PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval",
    "tags": ["statistic:top_logit"],
}


@final
class PreMoe(Pruner):
    """Drop the experts that a task's tokens select least surely, and find the task of a prompt.

    An expert's score, the task-conditioned expected selection score (TCESS), is the mean over all tokens of
    a task of the router's logit where the expert is the token's first, 0 elsewhere. A trace with a domain a
    task holds the patterns of all tasks: plan for one with ``trace.of("code")``, or for the one that
    `retrieve` finds nearest to a prompt's own trace.

    Shapes:
        A trace of L layers to the same number of experts dropped in each.

    Raises:
        BudgetError: fewer experts than routing needs would be left.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> stored = sample_trace(seed=0, num_experts=4)
        >>> prompt = stored.of("code")
        >>> task = PreMoe().retrieve(stored, prompt)
        >>> plan = PreMoe().plan(stored.of(task), Budget(num_experts=3))
        >>> task, [action.experts for action in plan.actions]
        ('code', [(0,), (0,)])

    Differences from the paper:
        See the statistic ``top_logit``. Every layer keeps the experts of its own highest scores, which is
        what its code comes to by a permutation of layers. Retrieval compares the scores of the first MoE
        layer by Euclidean distance, as its code does with an index; nothing is loaded here, a plan is made.
        Of several tasks in one trace, tokens are pooled.

    Reference:
        PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval (paper 202, arXiv
        2505.17639); its code, JarvisPei/PreMoe at 22780f1, ``collect_utils.py`` and ``partial_process.py``.
    """

    def plan(self, trace: Trace, budget: Budget) -> Plan:
        return keep_best(trace, budget, [layer.total("top_logit").sum(0) for layer in trace.layers])

    def retrieve(self, stored: Trace, prompt: Trace) -> str:
        """The domain of a stored trace whose pattern is nearest to that of a prompt's trace.

        Raises:
            UserError: the traces are of different models, or one lacks what is compared or has no tokens.
        """
        if stored.source_digest != prompt.source_digest:
            raise UserError(
                f"the stored trace is of the model {stored.source_digest} and the prompt's of "
                f"{prompt.source_digest}; observe the prompt with the model that the stored trace is of"
            )
        if not stored.layers:
            raise UserError("the stored trace has no MoE layers; observe a model with experts")
        if not sum(prompt.num_tokens) or not sum(stored.num_tokens):
            raise UserError("a trace has no tokens to tell a task by; observe some text")
        own = (_patterns(prompt) * torch.tensor(prompt.num_tokens)[:, None]).sum(0) / sum(prompt.num_tokens)
        apart = (_patterns(stored) - own).norm(dim=1)
        # A task without text is like no prompt.
        apart[torch.tensor(stored.num_tokens) == 0] = torch.inf
        return stored.domains[int(apart.argmin())]


def _patterns(trace: Trace) -> Float[Tensor, "M E"]:
    """Each domain's scores in the first MoE layer: means over its tokens."""
    tokens = torch.tensor(trace.num_tokens, dtype=torch.float64).clamp(min=1)
    return trace.layers[0].total("top_logit") / tokens[:, None]
