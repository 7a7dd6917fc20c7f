"""LoRA on the experts that a model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

from mixtura.errors import SettingError
from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._shared import (
    check_layer,
    check_score,
    chosen_settings,
    experts_at,
    low_rank,
    register_pairs,
    smallest_side,
)
from mixtura.types import Change, RouterInput, Site
from mixtura.types.trace import Trace

METHOD = {
    "paper": None,
    "title": "LoRA on the base's own experts",
    "tags": ["changes:experts", "mergeable", "expands_to_lora", "chooses_experts"],
}


@final
class ExpertLora(Adapter):
    """Fine-tune a mixture-of-experts model by two thin matrices beside each matrix of each expert.

    Expert e computes with ``W[e] + alpha / rank * b[e] @ a[e]`` in the place of ``W[e]``; ``b`` starts as
    zeros. Gate and up projection are one matrix, ``up``, as transformers keeps them. A token passes the thin
    matrices of its own experts only, and no changed matrix is built. In training a
    token that meets no expert that is changed gets what the base computes, to the bit.

    Args:
        rank: of every expert that ``ranks`` does not name.
        alpha: what is learned is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        experts: those that are changed, for all layers or by decoder layer (``{"3": [0, 5]}``); None for all.
        ranks: by expert (``"5"``), or by decoder layer and expert (``"3.5"``), which comes first.
        matrices: those that are changed, of ``up`` and ``down``.
        score: how a text chooses the experts where ``experts`` does not name them: ``gate`` by their share of
            the weights, ``token`` by their share of the assignments, ``all`` not at all. `mixtura tune` asks
            the text it tunes on.
        top_p: the share that the chosen ones have together at least.
        seed: of what ``a`` starts as.

    Shapes:
        For M of E experts ``up_a [M, R, D]``, ``up_b [M, rows, R]``, ``down_a [M, R, F]`` and
        ``down_b [M, D, R]``, R the highest rank; rows are 2 F where there is a gate.

    Raises:
        SettingError: a rank is not in [1, the smaller side of a matrix], another number is out of range, or
            a layer, an expert or a matrix is named that is not there.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"up": MatrixShape(8, 4), "down": MatrixShape(4, 4)}
        >>> site = Site(name="experts", kind="experts", layer=0, num_layers=1, matrices=shapes, num_experts=3)
        >>> made = ExpertLora(site, rank=2, alpha=4.0, experts=[0, 2]).change(RouterInput.of(torch.eye(4)))
        >>> made.expert_ids, made.matrices["up"].a.shape, made.matrices["up"].scale.tolist()
        ((0, 2), torch.Size([2, 2, 4]), [2.0, 2.0])
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        experts: dict[str, list[int]] | list[int] | None = None,
        ranks: dict[str, int] | None = None,
        matrices: list[Literal["up", "down"]] | None = None,
        score: Literal["all", "gate", "token"] = "all",
        top_p: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(site)
        most = smallest_side(site.matrices)
        self.rank = self.within("rank", rank, 1, most)
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.experts, self.ranks, self.matrices, self.seed = experts, ranks, matrices, seed
        self.score, self.top_p = check_score("ExpertLora", score), self.within("top_p", top_p, 0, 1)
        self.expert_ids = experts_at(site, experts, "ExpertLora")
        self._check_ranks(ranks or {})
        self.ranks_here = [self._rank_of(expert, most) for expert in self.expert_ids]
        self.changed = tuple(dict.fromkeys(matrices or site.matrices))
        register_pairs(self, self.changed, self.ranks_here, seed)

    @classmethod
    def settings_from(cls, trace: Trace, given: Mapping[str, Any]) -> dict[str, Any]:
        return chosen_settings(trace, given, "all", 0.2)

    def change(self, inputs: RouterInput) -> Change:
        del inputs
        part, alpha, ranks = self.get_parameter, self.alpha, self.ranks_here
        made = {name: low_rank(part(f"{name}_a"), part(f"{name}_b"), alpha, ranks) for name in self.changed}
        return Change(matrices=made, expert_ids=self.expert_ids)

    def _check_ranks(self, named: Mapping[str, int]) -> None:
        for key in named:
            layer, dot, expert = key.rpartition(".")
            if not expert.isdecimal() or (dot and not layer.isdecimal()):
                raise SettingError(f"ranks of ExpertLora name {key!r}; write EXPERT or LAYER.EXPERT")
            if dot:
                check_layer(self.site, layer, "ranks of ExpertLora")
            if (not dot or int(layer) == self.site.layer) and int(expert) >= self.site.num_experts:
                raise SettingError(
                    f"ranks of ExpertLora name expert {expert} in layer {self.site.layer}, which has experts "
                    f"0 to {self.site.num_experts - 1}"
                )

    def _rank_of(self, expert: int, most: int) -> int:
        named = self.ranks or {}
        found = named.get(f"{self.site.layer}.{expert}", named.get(str(expert), self.rank))
        return self.within("ranks", found, 1, most)
