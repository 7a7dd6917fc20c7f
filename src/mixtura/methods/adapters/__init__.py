"""Small trained parts beside a model's frozen matrices: LoRA on experts, LoRA experts, and their like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.methods import declared_tags
from mixtura.methods.settings import Ranged
from mixtura.types import Change, LowRank, Progress, RouterInput, Site
from mixtura.types.trace import Trace

KIND = {
    "base": "Adapter",
    "summary": "Adds small trained parts to a model whose own weights stay as they are.",
    "tags": {
        "changes:KIND": "what it changes: matrices of `experts`, `linear` layers, or dense `blocks`",
        "mergeable": "what it learned can be written into the base's weights: no token decides over it",
        "expands_to_lora": "what it learned is plain LoRA, which PEFT and servers read",
        "chooses_experts": "which experts it changes can be chosen by what routing did on some text",
        "trains_base": "trains copies of the base's matrices in full size",
        "shares:SCOPE": "sites of a `layer`, of a `role` in all layers or of the `model` share something",
        "per_prompt": "decides once for a sequence, by its prompt, and keeps to that for all that follows",
        "takes_library": "its LoRA experts can begin as LoRAs that were trained before",
        "reads:FIELD": "is told of `token_ids`, of `embeddings`, or before a step of `loads` and a `moment`",
        "adds_loss": "has a loss of its own, though what it learned can be merged",
        "acts_on_steps": "acts before each step of the optimizer, of which its trainer has to tell it",
        "looks_ahead": "a token's output may depend on later tokens",
        "batch_dependent": "a sequence's output may depend on the other sequences of the batch",
    },
}

_WHAT = {
    "linear": "a linear layer",
    "experts": "the experts of a layer",
    "block": "a dense feed-forward part",
}


class Adapter(nn.Module, Ranged, ABC):
    """What one adapter has at one site, a linear layer or all experts of a layer: parameters and their use.

    It draws its parameters from its own ``seed`` and starts as a change that changes nothing. The core finds
    the sites, applies the change, merges, saves and trains; an adapter never sees the model.

    Attributes:
        site: where it is.
        dropout: the share of a token's features that its factors do not see in training.
        idle: why it changes nothing at its site, whatever it learns; empty where it does. Losses are means
            over the other sites.
    """

    dropout: float = 0.0
    idle: str = ""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        wanted = {t.removeprefix("changes:") for t in declared_tags(type(self)) if t.startswith("changes:")}
        if not {site.kind, f"{site.kind}s"} & wanted:
            raise UserError(
                f"{type(self).__name__} changes {' and '.join(sorted(wanted))}, and {site.name} is "
                f"{_WHAT[site.kind]}; target others"
            )

    @abstractmethod
    def change(self, inputs: RouterInput) -> Change:
        """What becomes of the site's matrices for these tokens, differentiable in the parameters.

        A method tagged ``mergeable`` makes the same of every token, and so of none.
        """

    @classmethod
    def settings_from(cls, trace: Trace, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings, besides those given, that what routing did on a text decides."""
        del trace, given
        return {}

    def start(self, matrices: Mapping[str, Tensor]) -> None:
        """Begin with the base's matrices, as they are stored; ``[E, _, _]`` of experts."""
        del matrices

    def begin(self, embeddings: Float[Tensor, "V D"]) -> None:
        """Begin with the model's embeddings of its vocabulary, where the method is tagged to read them."""
        del embeddings

    def join(self, first: Adapter) -> None:
        """Share parameters with the first of the site's peers, which may be this one itself.

        They are the first one's, so that they are trained and saved once.
        """
        del first

    def take(self, library: Sequence[Mapping[str, LowRank]]) -> None:
        """Begin as LoRAs that were trained before, by name of matrix, each with one entry.

        Raises:
            UserError: the method has no use for them, or they do not fit.
        """
        raise UserError(f"{type(self).__name__} does not begin with LoRAs; see the tag takes_library")

    def before_step(self, progress: Progress) -> None:
        """See, and perhaps change, the gradients that the optimizer is about to use.

        A parameter whose gradient is set to None stays as it is. What is kept for later steps are buffers.
        """
        del progress
