"""Ways of one token through more or fewer of each layer's experts, and what each costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch

from mixtura.methods.analyses import ROWS_AT_ONCE, Study, Table
from mixtura.methods.analyses._shared import mean_of
from mixtura.methods.decoders import LayerFacts
from mixtura.types.steering import Steering

# The number of experts in each layer.
Path = tuple[int, ...]


def paths_of(
    study: Study,
    prefix: Sequence[int],
    after: int,
    sizes: Callable[[int], tuple[int, ...]],
    most_paths: int,
) -> dict[Path, float]:
    """The loss of every path that is tried, by the numbers of experts in each layer.

    Args:
        study: the model.
        prefix: tokens; the path is that of the last one.
        after: the token whose loss is taken.
        sizes: the numbers of experts to try in a layer of so many, the most first.
        most_paths: where there are more, they are not all tried.
    """
    options = [sizes(layer.top_k) for layer in study.layers]
    number = 1
    for one in options:
        number *= len(one)
    if number <= most_paths:
        return _losses(study, prefix, after, list(product(*options)))
    here = tuple(one[0] for one in options)
    found = _losses(study, prefix, after, [here])
    while True:
        smaller = [
            (*here[:i], options[i][options[i].index(size) + 1], *here[i + 1 :])
            for i, size in enumerate(here)
            if size != options[i][-1]
        ]
        if not smaller:
            return found
        made = _losses(study, prefix, after, smaller)
        found |= made
        here = min(made, key=lambda path: made[path])


def _losses(study: Study, prefix: Sequence[int], after: int, paths: Sequence[Path]) -> dict[Path, float]:
    found = {}
    for start in range(0, len(paths), ROWS_AT_ONCE):
        part = paths[start : start + ROWS_AT_ONCE]
        ways = [_steering(study.layers, path) for path in part]
        reads = study.run([prefix] * len(part), steering=ways, last_only=True)
        for path, read in zip(part, reads, strict=True):
            found[path] = -float(read.logits[-1].double().log_softmax(-1)[after])
    return found


def _steering(layers: Sequence[LayerFacts], path: Path) -> dict[int, Steering]:
    """Fewer experts than ever, by layer; with none the weights are 0."""
    found = {}
    for layer, size in zip(layers, path, strict=True):
        if size == 0:
            found[layer.index] = Steering(scale=torch.zeros(layer.num_experts))
        elif size < layer.top_k:
            found[layer.index] = Steering(ranks=torch.tensor([0, size]))
    return found


def by_cost(found: Sequence[dict[Path, float]]) -> Table:
    """Losses of the oracle, of one path for all and of the mean path, by the experts a token may run."""
    # What one path costs all tokens is known where all have tried the same ones.
    shared = found[0] if all(tried.keys() == found[0].keys() for tried in found) else {}
    rows = []
    for cost in sorted({sum(path) for tried in found for path in tried}):
        oracle = [min((x for p, x in tried.items() if sum(p) <= cost), default=None) for tried in found]
        fixed = [mean_of(tried[path] for tried in found) for path in shared if sum(path) <= cost]
        mean = mean_of(x for tried in found for path, x in tried.items() if sum(path) == cost)
        known = [one for one in fixed if one is not None]
        whole = None if None in oracle else mean_of(oracle)
        rows.append((cost, whole, min(known) if known else None, mean))
    return Table(
        title="Loss by the experts a token may run in all layers together",
        columns=("experts", "oracle", "fixed", "mean path"),
        rows=tuple(rows),
    )
