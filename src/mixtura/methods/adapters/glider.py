"""LoRA experts that a token's features and its prompt choose together."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods.adapters._prompts import Joined, prompt_means
from mixtura.methods.adapters._shared import LoraExperts, lora_gate, site_seed, top_shares
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": 47,
    "title": "Glider: Global and Local Instruction-Driven Expert Router",
    "tags": ["changes:linear", "shares:model", "per_prompt", "looks_ahead", "takes_library"],
}


@final
class Glider(LoraExperts, Joined):
    """Fine-tune LoRA experts that a global and a local router choose together: by the task, and the token.

    The global one compares the prompt with a vector of each expert's task, once for all layers; the local one
    each layer's token with a vector of each expert. The sum of both decides. It cannot be merged, because
    tokens decide.

    Args:
        rank: of each LoRA expert, at least that of a library's.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer.
        top_k: experts that a token gets, by their softmax over its sum.
        guidance: what the likeness of prompt and task counts; 0 leaves all to the local router.
        seed: of what the parameters start as.

    Shapes:
        Parameters ``a [M, R, cols]``, ``b [M, rows, R]`` and ``gate [M, cols]``; at the first site ``tasks
        [M, D]``.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=0, num_layers=4, matrices=shapes)
        >>> made = Glider(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, (made.shares > 0).sum(-1).tolist()
        (torch.Size([4, 4]), [2, 2, 2, 2])

    Differences from the paper:
        The prompt's vector is the mean of what the first changed layer is given of it, and tasks' vectors are
        trained with the rest; there a language model words an instruction, which another model embeds. Local
        vectors are trained with the experts, not one expert at a time by a gate of its own. ``guidance`` is
        3, the published value for tasks that are not known; for known ones it is 100. LoRAs of a library keep
        their own scale.

    Reference:
        Glider: Global and Local Instruction-Driven Expert Router (paper 47); its code, UNITES-Lab/glider.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        num_experts: int = 4,
        top_k: int = 2,
        guidance: float = 3.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            site,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            num_experts=num_experts,
            balance=0.0,
            seed=seed,
        )
        self.top_k = self.within("top_k", top_k, 1, num_experts)
        self.guidance = self.within("guidance", guidance, 0, 1e6)
        self.gate = lora_gate(self)
        if site.place == 0:
            cols = site.matrices["weight"].cols
            self.tasks = drawn(site_seed(site, seed, "tasks"), num_experts, cols)

    def change(self, inputs: RouterInput) -> Change:
        if inputs.state is None:
            means = prompt_means(inputs, exact(inputs.x.detach()))
            state, history = means[inputs.sequences], {"prompt": means}
        else:
            state, history = inputs.state, {}
        logits = self.local(inputs.x) + self.guidance * self.likeness(state)
        made = self.mixed(top_shares(logits.softmax(-1), self.top_k), {})
        return Change(matrices=made.matrices, shares=made.shares, state=state, history=history)

    def local(self, x: Float[Tensor, "T cols"]) -> Float[Tensor, "T M"]:
        """What the layer's own router says: products of normed vectors over the root of their size."""
        width = x.shape[1]
        normed, rows = F.layer_norm(exact(x), (width,)), F.layer_norm(exact(self.gate), (width,))
        root: float = width**0.5
        return exact_logits(normed, rows) / root

    def likeness(self, state: Float[Tensor, "T cols"]) -> Float[Tensor, "T M"]:
        """How alike each token's prompt and the task of each expert are: their cosine."""
        tasks = self.first.get_parameter("tasks")
        if state.shape[1] != tasks.shape[1]:
            raise UserError(
                f"tasks of Glider have {tasks.shape[1]} features, and {self.site.name}, which runs first, "
                f"reads {state.shape[1]}; target layers that read the residual stream first, such as q_proj"
            )
        return exact_logits(F.normalize(state, dim=-1), F.normalize(exact(tasks).to(state.device), dim=-1))
