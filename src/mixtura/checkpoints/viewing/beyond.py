"""Tensors of a checkpoint that transformers does not load but that follow the experts when some go.

Others do load them: layers that predict several tokens ahead, which have as many experts as the layers
before them, and what lies beside single experts, such as the scales of their inputs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mixtura.checkpoints.viewing.mapping import EXPERT_NUMBER

_EXPERTS = ".experts."
# How configs call the number of layers for predicting several tokens ahead, and whether there are any.
_PREDICTION_KEY = re.compile(r"(^|_)(mtp|nextn)(_|$)")


def layers_beyond(
    unused: Iterable[str],
    used: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    counts: Collection[int],
) -> tuple[str, ...]:
    """The beginnings of names of layers with experts that the model does not have.

    Args:
        unused: the stored names that belong to no parameter of the model.
        used: those that do.
        shapes: of every stored tensor.
        counts: how many experts the model's layers have; a tower with another number is not one of them.

    >>> names = {f"mtp.layers.0.mlp.experts.{e}.up_proj.weight": (4, 4) for e in range(2)}
    >>> layers_beyond(names, ["model.norm.weight"], names, {2})
    ('mtp.',)
    """
    found: dict[str, int] = {}
    taken = _beginnings(used)
    for name in unused:
        if _EXPERTS not in name:
            continue
        parts = name[: name.index(_EXPERTS)].split(".")
        heads = (".".join(parts[:n]) + "." for n in range(1, len(parts) + 1))
        head = next((head for head in heads if head not in taken), None)
        if head is not None:
            number = EXPERT_NUMBER.search(name)
            experts = int(number.group()) + 1 if number else (shapes[name] or (0,))[0]
            found[head] = max(found.get(head, 0), experts)
    return tuple(head for head, experts in found.items() if experts in counts)


def without_prediction(raw: dict[str, Any]) -> None:
    """Say in a ``config.json`` that no layers predict several tokens ahead."""
    for key, value in raw.items():
        if isinstance(value, dict):
            without_prediction(value)
        elif _PREDICTION_KEY.search(key) and isinstance(value, int):
            raw[key] = type(value)(0)


def beside_experts(unused: Iterable[str], expert_names: Iterable[str]) -> dict[str, int]:
    """Unused names that stand beside those of single experts, and the number in each.

    Args:
        unused: the stored names that belong to no parameter of the model.
        expert_names: the stored names of some expert.
    """
    matches = ((name, EXPERT_NUMBER.search(name)) for name in expert_names)
    heads = {name[: match.start()] for name, match in matches if match is not None}
    found = ((name, EXPERT_NUMBER.search(name)) for name in unused)
    return {name: int(match.group()) for name, match in found if match and name[: match.start()] in heads}


def _beginnings(names: Iterable[str]) -> set[str]:
    """Every beginning of every name that ends in a dot."""
    found: set[str] = set()
    for name in names:
        end = name.rfind(".")
        while end >= 0 and name[: end + 1] not in found:
            found.add(name[: end + 1])
            end = name.rfind(".", 0, end)
    return found
