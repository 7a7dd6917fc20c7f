"""LoRA on the experts that text hardly uses, for the tokens of another modality alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._shared import experts_at, low_rank, register_pairs, smallest_side
from mixtura.methods.adapters._transport import coupling, distances, spread
from mixtura.types import Change, RouterInput, Site
from mixtura.types.trace import Trace

METHOD = {
    "paper": 78,
    "title": "Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities",
    "tags": ["changes:experts", "reads:token_ids", "reads:embeddings", "chooses_experts"],
}


@final
class ModalityLora(Adapter):
    """Fine-tune a model for new tokens, of pictures say, on experts that text hardly uses, text untouched.

    Only tokens of a stretch of the vocabulary meet what is added, so text that no such token came before is
    what it was, but for rounding. The experts are those that a text reaches least (`mixtura tune` asks the
    text it tunes on, so name them by ``experts`` where that is no text). The thin matrices begin along the
    directions in which the old tokens' embeddings and the new ones' go together, by the distance of Gromov
    and Wasserstein. It cannot be merged, because tokens decide.

    Args:
        first_token: the first entry of the vocabulary that is of the new modality.
        last_token: the last one; -1 for the end of the vocabulary.
        rank: of every expert that is changed.
        alpha: what is learned is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        experts: those that are changed, for all layers or by decoder layer (``{"3": [0, 5]}``); None for all.
        share: of a layer's experts, how many are taken where a text chooses, those it reaches least.
        samples: embeddings of each modality that are compared; 0 to begin as LoRA does.
        seed: of what ``a`` starts as.

    Shapes:
        For M of E experts ``up_a [M, R, D]``, ``up_b [M, rows, R]``, ``down_a [M, R, F]`` and
        ``down_b [M, D, R]``.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of a matrix], the stretch is empty, another
        number
            is out of range, or a layer or expert is named that is not there.

    Example:
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"up": MatrixShape(8, 4), "down": MatrixShape(4, 4)}
        >>> site = Site(name="experts", kind="experts", layer=0, num_layers=1, matrices=shapes, num_experts=3)
        >>> given = RouterInput.of(torch.eye(4), token_ids=torch.tensor([3, 90, 91, 5]))
        >>> ModalityLora(site, first_token=90, rank=2).change(given).tokens.tolist()
        [False, True, True, False]

    Differences from the paper:
        Written from the abstract. Which experts are redundant, what of the distance the matrices begin with
        (the right singular vectors of the embeddings' products under the coupling of least entropic distance,
        for ``up`` alone) and all numbers are choices. Without a stretch of the vocabulary all tokens are new.

    Reference:
        Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities (paper 78, abstract).
    """

    def __init__(
        self,
        site: Site,
        *,
        first_token: int = 0,
        last_token: int = -1,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        experts: dict[str, list[int]] | list[int] | None = None,
        share: float = 0.5,
        samples: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(site)
        self.first_token = self.within("first_token", first_token, 0, 1 << 40)
        self.last_token = self.within("last_token", last_token, -1, 1 << 40)
        if -1 < last_token < first_token:
            raise SettingError(
                f"last_token of ModalityLora must be -1 or at least first_token={first_token}, got "
                f"{last_token}"
            )
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.share = self.within("share", share, 0, 1)
        self.samples = self.within("samples", samples, 0, 4096)
        self.experts, self.seed = experts, seed
        self.expert_ids = experts_at(site, experts, "ModalityLora")
        register_pairs(self, site.matrices, [rank] * len(self.expert_ids), seed)

    @classmethod
    def settings_from(cls, trace: Trace, given: Mapping[str, Any]) -> dict[str, Any]:
        if given.get("experts") is not None:
            return {}
        chosen = {}
        for layer in trace.layers:
            loads = layer.counts.double().sum(0)
            few = round(float(given.get("share", 0.5)) * len(loads))
            chosen[str(layer.index)] = sorted(torch.sort(loads, stable=True).indices[:few].tolist())
        return {"experts": chosen}

    @torch.no_grad()
    def begin(self, embeddings: Float[Tensor, "V D"]) -> None:
        new = self.is_new(torch.arange(len(embeddings), device=embeddings.device))
        up = self.get_parameter("up_a")
        if not self.samples or new.all() or not new.any() or not up.numel():
            return
        old_rows, new_rows = (spread(embeddings[one].double(), self.samples) for one in (~new, new))
        plan = coupling(distances(old_rows), distances(new_rows))
        directions = torch.linalg.svd(old_rows.T @ plan @ new_rows).Vh[: self.rank]
        # As long as LoRA's own rows are at the start, on average.
        length = (up.shape[2] / 3) ** 0.5 * up.shape[2] ** -0.5
        up[:, : len(directions)] = (directions * length).to(up)

    def is_new(self, token_ids: Tensor) -> Bool[Tensor, " T"]:
        """Whether tokens are of the new modality."""
        above = token_ids >= self.first_token
        return above if self.last_token == -1 else above & (token_ids <= self.last_token)

    def change(self, inputs: RouterInput) -> Change:
        part, ranks = self.get_parameter, [self.rank] * len(self.expert_ids)
        made = {
            name: low_rank(part(f"{name}_a"), part(f"{name}_b"), self.alpha, ranks)
            for name in self.site.matrices
        }
        tokens = self.is_new(inputs.need("token_ids", "ModalityLora"))
        return Change(matrices=made, expert_ids=self.expert_ids, tokens=tokens)
