"""What each domain loses when some experts may not be chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods.analyses import ROWS_AT_ONCE, Analysis, Evidence, Report, Study, Table
from mixtura.methods.analyses._masking import by_layer, steering
from mixtura.methods.analyses._shared import generator_of, mean_of, ratio
from mixtura.types.steering import Steering

METHOD = {
    "paper": 69,
    "title": "Large Language Lobotomy: Jailbreaking Mixture-of-Experts via Expert Silencing",
    "tags": ["needs:study", "steers"],
}


@final
class ExpertMasking(Analysis):
    """Masking experts: how much worse does a model predict each domain without them, and without random ones?

    ``experts`` are pairs of a decoder layer and an expert, as an audit such as ``class_attribution`` or
    ``standing_committee`` names them. No token may choose them, and the router chooses among the others, as
    if they were not there. ``change`` is how much the loss (nats a token) rises, ``random`` the same for as
    many others of the same layers, on average over ``draws``.

    Shapes:
        A model of L layers and its text to L rows, and a table of M domains.

    Raises:
        SettingError: a setting is out of range.
        UserError: a layer or an expert is not there, or fewer are left than a token chooses.

    Example:
        >>> ExpertMasking(experts=[[0, 3]]).experts
        [[0, 3]]

    Differences from the paper:
        Only the measurement, of whatever text is observed; the paper masks until a model gives answers that
        it should refuse, and that search is left out on purpose. Random masks are ours.

    Reference:
        Large Language Lobotomy: Jailbreaking Mixture-of-Experts via Expert Silencing (paper 69).
    """

    def __init__(
        self,
        *,
        experts: list[list[int]] = [],  # noqa: B006 - never changed
        draws: int = 3,
        most_texts: int = 32,
        most_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        check_range("ExpertMasking", "draws", draws, 0, 100)
        check_range("ExpertMasking", "most_texts", most_texts, 1, 1 << 20)
        check_range("ExpertMasking", "most_tokens", most_tokens, 2, 1 << 20)
        self.experts = experts
        self.draws, self.most_texts, self.most_tokens, self.seed = draws, most_texts, most_tokens, seed

    def measure(self, evidence: Evidence) -> Report:
        study = evidence.model()
        masked = by_layer("ExpertMasking", self.experts, study.layers)
        ways = [{}, steering(masked, study.layers), *self._random(masked, study)]
        losses: dict[str, list[list[float]]] = {}
        used = {layer.index: [0, 0] for layer in study.layers}
        for passage in study.passages[: self.most_texts]:
            ids = passage.token_ids[: self.most_tokens]
            if len(ids) < 2:
                continue
            parts = [ways[at : at + ROWS_AT_ONCE] for at in range(0, len(ways), ROWS_AT_ONCE)]
            read = [one for part in parts for one in study.run([ids] * len(part), steering=part)]
            target = torch.tensor(ids[1:])
            losses.setdefault(passage.domain, []).extend(
                torch.stack(
                    [F.cross_entropy(r.logits[:-1].cpu(), target, reduction="none") for r in read]
                ).T.tolist()
            )
            for index, chosen in read[0].chosen.items():
                if index in used:
                    hits = torch.isin(chosen, torch.tensor(masked.get(index, ()), dtype=chosen.dtype))
                    used[index] = [used[index][0] + int(hits.sum()), used[index][1] + chosen.numel()]
        rows = tuple(
            {"layer": index, "masked": len(masked.get(index, ())), "share_of_choices": ratio(*counts)}
            for index, counts in used.items()
        )
        every = [one for found in losses.values() for one in found]
        whole = _means(every, self.draws)
        table = Table(
            title="Loss by domain, nats a token",
            columns=("domain", "tokens", "loss", "change", "random"),
            rows=tuple((name, len(one), *_means(one, self.draws).values()) for name, one in losses.items()),
        )
        return Report(whole, rows, tables=(table,))

    def _random(self, masked: Mapping[int, Sequence[int]], study: Study) -> list[dict[int, Steering]]:
        """Steerings that mask as many others of the same layers."""
        generator, made = generator_of(self.seed), []
        for _ in range(self.draws):
            drawn = {}
            for layer in study.layers:
                others = [e for e in range(layer.num_experts) if e not in masked.get(layer.index, ())]
                order = torch.randperm(len(others), generator=generator)[: len(masked.get(layer.index, ()))]
                drawn[layer.index] = tuple(others[place] for place in order.tolist())
            made.append(steering(drawn, study.layers))
        return made


def _means(losses: Sequence[Sequence[float]], draws: int) -> dict[str, float | None]:
    """The loss, how much it rises, and how much with random masks."""
    if not losses:
        return {"loss": None, "change": None, "random": None}
    means = [mean_of(column) or 0.0 for column in zip(*losses, strict=True)]
    random = mean_of(one - means[0] for one in means[2:]) if draws else None
    return {"loss": means[0], "change": means[1] - means[0], "random": random}
