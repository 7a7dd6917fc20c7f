"""Small trained parts beside a model's frozen matrices: LoRA on experts, LoRA experts, and their like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from mixtura.errors import UserError, check_range
from mixtura.methods import declared_tags
from mixtura.types import Change, RouterInput, Site
from mixtura.types.trace import Trace

N = TypeVar("N", int, float)

KIND = {
    "base": "Adapter",
    "summary": "Adds small trained parts to a model whose own weights stay as they are.",
    "tags": {
        "changes:KIND": "what it changes: the matrices of `experts`, or `linear` layers",
        "mergeable": "what it learned can be written into the base's weights: no token decides over it",
        "expands_to_lora": "what it learned is plain LoRA, which PEFT and servers read",
        "chooses_experts": "which experts it changes can be chosen by what routing did on some text",
        "trains_base": "trains copies of the base's matrices in full size",
        "looks_ahead": "a token's output may depend on later tokens",
        "batch_dependent": "a sequence's output may depend on the other sequences of the batch",
    },
}


class Adapter(nn.Module, ABC):
    """What one adapter has at one site, a linear layer or all experts of a layer: parameters and their use.

    It draws its parameters from its own ``seed`` and starts as a change that changes nothing. The core finds
    the sites, applies the change, merges, saves and trains; an adapter never sees the model.

    Attributes:
        site: where it is.
        dropout: the share of a token's features that its factors do not see in training.
    """

    dropout: float = 0.0

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        wanted = {t.removeprefix("changes:") for t in declared_tags(type(self)) if t.startswith("changes:")}
        if site.kind not in wanted:
            raise UserError(
                f"{type(self).__name__} changes {' and '.join(sorted(wanted))}, and {site.name} is "
                f"{'a linear layer' if site.kind == 'linear' else 'the experts of a layer'}; target others"
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

    def within(self, name: str, value: N, low: float, high: float) -> N:
        """A setting's value, if it is in the range.

        Raises:
            SettingError: it is not.
        """
        check_range(type(self).__name__, name, value, low, high)
        return value
