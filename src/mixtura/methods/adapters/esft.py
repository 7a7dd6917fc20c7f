"""Training the experts that a task's text reaches, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._shared import check_score, chosen_settings, experts_at
from mixtura.types import Change, Own, RouterInput, Site
from mixtura.types.trace import Trace

METHOD = {
    "paper": None,
    "title": "Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning",
    "tags": ["changes:experts", "mergeable", "chooses_experts", "trains_base"],
}


@final
class Esft(Adapter):
    """Fine-tune, in full, the few experts of each layer that the task's text reaches; all else is frozen.

    An expert is scored by its share of the text's assignments (``token``) or of their weights (``gate``), and
    those of highest score are taken until they have ``top_p`` of it together. What is trained are copies of
    their matrices, kept in float32 and multiplied in the base's dtype, so that they begin as the base to the
    bit and merge without rounding twice.

    Args:
        experts: those that are trained, for all layers or by decoder layer (``{"3": [0, 5]}``); None for all.
        score: how a text chooses them where ``experts`` does not name them; ``all`` trains all.
            `mixtura tune` asks the text it tunes on.
        top_p: the share that the chosen ones have together at least.

    Shapes:
        For M of E experts ``up [M, _, _]`` and ``down [M, _, _]``, stored as the base's.

    Raises:
        SettingError: ``top_p`` is not in [0, 1], or an expert is named that is not there.

    Example:
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"up": MatrixShape(8, 4), "down": MatrixShape(4, 4)}
        >>> site = Site(name="experts", kind="experts", layer=0, num_layers=1, matrices=shapes, num_experts=3)
        >>> made = Esft(site, experts=[1]).change(RouterInput.of(torch.eye(4)))
        >>> made.expert_ids, made.matrices["up"].weight.shape
        ((1,), torch.Size([1, 8, 4]))

    Differences from its code:
        Shares are of a layer's experts; the script sums over the wrong axis, by which an expert's scores in
        all layers sum to 1. Scores are not rounded to four places. Weights are those that reach the experts.
        Shared experts and other modules are trained by PEFT's ``modules_to_save`` where that is wanted.

    Reference:
        deepseek-ai/ESFT at 36c6194, ``scripts/expert/generate_expert_config.py`` and ``esft.py``.
    """

    def __init__(
        self,
        site: Site,
        *,
        experts: dict[str, list[int]] | list[int] | None = None,
        score: Literal["all", "gate", "token"] = "token",
        top_p: float = 0.2,
    ) -> None:
        super().__init__(site)
        self.experts = experts
        self.score, self.top_p = check_score("Esft", score), self.within("top_p", top_p, 0, 1)
        self.expert_ids = experts_at(site, experts, "Esft")
        count = len(self.expert_ids)
        for name, shape in site.matrices.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(count, *shape.stored)))

    @classmethod
    def settings_from(cls, trace: Trace, given: Mapping[str, Any]) -> dict[str, Any]:
        return chosen_settings(trace, given, "token", 0.2)

    def start(self, matrices: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, stacked in matrices.items():
                self.get_parameter(name).copy_(stacked[list(self.expert_ids)])

    def change(self, inputs: RouterInput) -> Change:
        del inputs
        made = {name: Own(self.get_parameter(name)) for name in self.site.matrices}
        return Change(matrices=made, expert_ids=self.expert_ids)
