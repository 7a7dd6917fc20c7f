"""The same share of every domain."""

from __future__ import annotations

from typing import final

from mixtura.methods.data_mixers import DataMixer, Domains, Standing, State, Stretch

METHOD = {
    "paper": None,
    "title": "Equal shares (stratified sampling), a baseline of all data mixers",
    "tags": ["schedule"],
}


@final
class Uniform(DataMixer):
    """Read as much of every domain, whatever its size: stratified sampling, which is hard to beat.

    Shapes:
        Losses ``[G]`` of G domains to shares ``[G]``.

    Example:
        >>> import torch
        >>> from mixtura.methods.data_mixers import mix
        >>> known = Domains(("code", "prose"), torch.tensor([300.0, 100.0]), 10, 5)
        >>> mix(Uniform(), known, torch.ones(2)).tolist()
        [0.5, 0.5]
    """

    def next(self, domains: Domains, state: State, standing: Standing) -> tuple[State, Stretch]:
        return state, Stretch(domains.equal, domains.every)
