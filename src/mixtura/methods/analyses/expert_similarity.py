"""How alike experts are: their matrices, their router's rows, their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.analyses import Analysis, Evidence, Grid, Report, Study
from mixtura.methods.analyses._shared import generator_of, mean_of, over_layers
from mixtura.methods.analyses._similarity import (
    cosines,
    matched,
    mean_below,
    pairwise,
    rank_counts,
    squared_correlation,
)

METHOD = {
    "paper": 142,
    "title": "A Closer Look into Mixture-of-Experts in Large Language Models",
    "tags": ["needs:study"],
}
_MEASURES = ("gate", "up", "down", "router", "gate_and_router", "outputs", "rank_agreement", "matched")
_WIDEST_MAP = 64


@final
class ExpertSimilarity(Analysis):
    """Similarity of experts, by their weights and by what they do; do routers choose those of large output?

    ``gate``, ``up`` and ``down`` are the mean cosine of every two experts' flattened matrices, ``router``
    that of the router's rows, and ``gate_and_router`` the squared correlation of the two over all pairs:
    whether experts that are chosen alike switch neurons alike. On ``tokens`` tokens every expert is run:
    ``outputs`` is the mean cosine of what every two make of the same token, ``rank_agreement`` the share of
    experts whose place by the norm of their output is their place by the router's score (1 over E by chance;
    a map shows all places). ``matched`` is the mean cosine of the neurons of ``pairs`` pairs of experts, as
    rows of ``up``, after the best matching: 1 for experts that are the same but for the order of their
    neurons.

    Shapes:
        A model of L layers of E experts and T tokens to L rows, and a map [E, E] of the last layer.

    Raises:
        SettingError: a setting is out of range.

    Example:
        >>> bool(abs(pairwise(torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])) + 1 / 3) < 1e-6)
        True

    Differences from the paper:
        Its code rounds cosines to two digits before it averages them; not here. Experts are not compared with
        the feed-forward layer of a dense model, Kendall's tau of the matching and intermediate states are
        left out, and norms are ranked within all experts of a layer, shared ones excepted.

    Reference:
        A Closer Look into Mixture-of-Experts in Large Language Models (paper 142); its code,
        kamanphoebe/Look-into-MoEs, ``dynamic_analysis.ipynb`` at 2074e3b in part, else as told of it.
    """

    def __init__(self, *, tokens: int = 128, pairs: int = 3, seed: int = 0) -> None:
        check_range("ExpertSimilarity", "tokens", tokens, 1, 1 << 20)
        check_range("ExpertSimilarity", "pairs", pairs, 0, 10_000)
        self.tokens, self.pairs, self.seed = tokens, pairs, seed

    def measure(self, evidence: Evidence) -> Report:
        study = evidence.model()
        inputs, scores = self._seen(study)
        rows, ranks = [], None
        for layer in study.layers:
            row: dict[str, float | None] = {"layer": layer.index} | dict.fromkeys(_MEASURES)
            row |= self._of_weights(study, layer.index, layer.num_experts)
            if layer.index in inputs and layer.index in scores:
                made = study.outputs(layer.index, inputs[layer.index])
                ranks = rank_counts(made.norm(dim=-1).T, scores[layer.index])
                row["outputs"] = mean_of(pairwise(made[:, token]) for token in range(made.shape[1]))
                row["rank_agreement"] = float(ranks.diagonal().sum() / ranks.sum())
            rows.append(row)
        scalars = {name: mean_of(row[name] for row in rows) for name in _MEASURES}
        figures: list[Grid] = []
        if ranks is not None and len(ranks) <= _WIDEST_MAP:
            figures.append(_map(study.layers[-1].index, ranks))
        lines = over_layers("How alike experts are", "mean cosine", rows, "outputs", "router", "matched")
        return Report(scalars, tuple(rows), figures=(*lines, *figures))

    def _seen(self, study: Study) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """By layer, what its experts are given and its router's logits, of the first tokens of the text."""
        inputs: dict[int, list[Tensor]] = {}
        scores: dict[int, list[Tensor]] = {}
        left = self.tokens
        for passage in study.passages:
            if left <= 0:
                break
            read = study.run([passage.token_ids[:left]], scores=True)[0]
            left -= len(passage.token_ids[:left])
            for kept, new in ((inputs, read.inputs), (scores, read.scores)):
                for index, values in new.items():
                    kept.setdefault(index, []).append(values)
        return ({i: torch.cat(x) for i, x in inputs.items()}, {i: torch.cat(x) for i, x in scores.items()})

    def _of_weights(self, study: Study, index: int, num_experts: int) -> Mapping[str, float | None]:
        every = [study.matrices(index, expert) for expert in range(num_experts)]
        tables = {name: cosines(torch.stack([one[name].flatten() for one in every])) for name in every[0]}
        router = cosines(study.router(index))
        found: dict[str, float | None] = {name: mean_below(table) for name, table in tables.items()}
        found["router"] = mean_below(router)
        found["gate_and_router"] = squared_correlation(tables["gate"], router) if "gate" in tables else None
        generator = generator_of(self.seed)
        picked = [torch.randperm(num_experts, generator=generator)[:2].tolist() for _ in range(self.pairs)]
        found["matched"] = mean_of(
            matched(every[one]["up"], every[other]["up"]) for one, other in picked if num_experts > 1
        )
        return found


def _map(index: int, ranks: Float[Tensor, "E E"]) -> Grid:
    names = tuple(str(place + 1) for place in range(len(ranks)))
    shares = (ranks / ranks.sum(1, keepdim=True)).tolist()
    return Grid(
        title=f"Places by norm and by score in layer {index}: shares of each row, the largest last",
        values=tuple(map(tuple, shares)),
        row_labels=names,
        column_labels=names,
        row_name="place by the norm of the output",
        column_name="place by the router's score",
    )
