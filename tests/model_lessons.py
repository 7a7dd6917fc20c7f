"""Lessons small enough to be worked by hand, for the tests of model routers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch


def lessons(
    points: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    *,
    labels: Sequence[dict[str, str]] = (),
    costs: Sequence[Sequence[float]] | None = None,
    sizes: Sequence[int] | None = None,
) -> Lessons:
    """Lessons of models named a, b, c, ...; points are made one long."""
    rows = np.array(points, dtype=float)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    known = [dict(one) for one in labels] or [{} for _ in points]
    prompts = tuple(Prompt(id=f"{n:04}", labels=one) for n, one in enumerate(known))
    values = np.array(scores, dtype=float)
    names = "abcdefghijklmnopqrstuvwxyz"[: values.shape[1]]
    cards = tuple(
        ModelCard(name=x, num_bytes=None if sizes is None else sizes[n]) for n, x in enumerate(names)
    )
    money = np.ones_like(values) if costs is None else np.array(costs, dtype=float)
    return Lessons(PromptBatch(prompts, rows), cards, values, money)


NAN = float("nan")
