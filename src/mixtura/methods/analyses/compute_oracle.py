"""How little would do: the best path through all, one or none of each layer's experts, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from mixtura.errors import UserError, check_range
from mixtura.methods.analyses import Analysis, Evidence, Lines, Report, Study
from mixtura.methods.analyses._paths import Path, by_cost, paths_of
from mixtura.methods.analyses._shared import mean_of, ratio

METHOD = {
    "paper": 138,
    "title": "Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
    "tags": ["needs:study", "steers"],
}


@final
class ComputeOracle(Analysis):
    """Adaptive computation's best possible: which layers' experts does each token need at all?

    For some tokens of the text every path is tried: in each layer all K experts, the best one, or with
    ``skip`` none (shared experts stay), of this token alone, the tokens before it being computed in full. A
    path costs the experts it runs. By cost, a table has the loss (nats) of the ``oracle`` that knows the
    answer and takes the best path of at most that cost for each token, of the best ``fixed`` path for all of
    them, and the mean of all paths of that cost. ``saved`` is the share of experts that the oracle leaves out
    while no token's loss is higher than in full; ``better`` the share of tokens that a cheaper path predicts
    better.

    Above ``most_paths`` paths a token they are not all tried: from the full path the layer that costs least
    is made smaller, again and again; the oracle is the best of what was seen, and ``fixed`` is not known.

    Shapes:
        A model of L layers and its text to L rows, and a table by cost.

    Raises:
        SettingError: a setting is out of range.
        UserError: no text is long enough.

    Example:
        >>> ComputeOracle(skip=False).sizes(4)
        (4, 1)

    Differences from the paper:
        The paper trains small and large modules beside each other; here the small one is a token's best
        expert alone, of a model that is as it is and was not trained to do without the others. Its routers
        that are trained for a budget are not built.

    Reference:
        Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models (paper 138).
    """

    def __init__(
        self, *, texts: int = 4, tokens: int = 4, length: int = 48, skip: bool = True, most_paths: int = 256
    ) -> None:
        check_range("ComputeOracle", "texts", texts, 1, 1 << 20)
        check_range("ComputeOracle", "tokens", tokens, 1, 1 << 20)
        check_range("ComputeOracle", "length", length, 2, 1 << 20)
        check_range("ComputeOracle", "most_paths", most_paths, 2, 1 << 20)
        self.texts, self.tokens, self.length = texts, tokens, length
        self.skip, self.most_paths = skip, most_paths

    def sizes(self, top_k: int) -> tuple[int, ...]:
        """Numbers of experts that a layer may run for a token, the most first."""
        return tuple(dict.fromkeys((top_k, 1, *((0,) if self.skip else ()))))

    def measure(self, evidence: Evidence) -> Report:
        study = evidence.model()
        cases = self._cases(study)
        found = [paths_of(study, prefix, after, self.sizes, self.most_paths) for prefix, after in cases]
        full = tuple(layer.top_k for layer in study.layers)
        free = [_cheapest(tried, full) for tried in found]
        best = [_best(tried) for tried in found]
        rows = tuple(
            {
                "layer": layer.index,
                "all": ratio(sum(path[i] == layer.top_k for path in best), len(best)),
                "one": ratio(sum(path[i] == 1 < layer.top_k for path in best), len(best)),
                "none": ratio(sum(path[i] == 0 for path in best), len(best)),
            }
            for i, layer in enumerate(study.layers)
        )
        scalars = {
            "loss": mean_of(tried[full] for tried in found),
            "oracle": mean_of(min(tried.values()) for tried in found),
            "saved": 1 - (mean_of(sum(path) for path in free) or 0.0) / sum(full),
            "better": mean_of(float(min(tried.values()) < tried[full]) for tried in found),
            "tokens": len(found),
            "paths": mean_of(len(tried) for tried in found),
        }
        table = by_cost(found)
        curves = {
            name: tuple((float(row[0] or 0), float(row[i] or 0)) for row in table.rows if row[i] is not None)
            for i, name in enumerate(table.columns)
            if i and any(row[i] is not None for row in table.rows)
        }
        title = "Loss by the experts a token may run"
        picture = Lines(title=title, x_label="experts", y_label="loss, nats", series=curves)
        return Report(scalars, rows, tables=(table,), figures=(picture,))

    def _cases(self, study: Study) -> list[tuple[list[int], int]]:
        """Beginnings of texts, evenly placed, and the token after each."""
        found = []
        for passage in study.passages[: self.texts]:
            ids = passage.token_ids[: self.length + 1]
            last = len(ids) - 2
            places = sorted({round(last * (i + 1) / self.tokens) for i in range(self.tokens)})
            found += [(list(ids[: place + 1]), ids[place + 1]) for place in places if last >= 0]
        if not found:
            raise UserError("no text has two tokens, a token and its successor; observe more text")
        return found


def _cheapest(tried: Mapping[Path, float], full: Path) -> Path:
    """Of the paths that lose no more than the full one, the one of fewest experts."""
    return min(tried, key=lambda path: (tried[path] > tried[full], sum(path), tried[path]))


def _best(tried: Mapping[Path, float]) -> Path:
    """The path of the least loss, of several the one of fewest experts."""
    return min(tried, key=lambda path: (tried[path], sum(path)))
