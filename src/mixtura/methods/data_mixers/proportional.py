"""Every domain in proportion to how much text there is of it."""

from __future__ import annotations

from typing import final

from mixtura.methods.data_mixers import DataMixer, Domains, Standing, State, Stretch

METHOD = {
    "paper": None,
    "title": "Shares by size, what mixing all text in one heap comes to",
    "tags": ["schedule"],
}


@final
class Proportional(DataMixer):
    """Read each domain in proportion to its tokens, as if all text were one heap: a baseline.

    Shapes:
        Losses ``[G]`` of G domains to shares ``[G]``.

    Example:
        >>> import torch
        >>> from mixtura.methods.data_mixers import mix
        >>> known = Domains(("code", "prose"), torch.tensor([300.0, 100.0]), 10, 5)
        >>> mix(Proportional(), known, torch.ones(2)).tolist()
        [0.75, 0.25]
    """

    def next(self, domains: Domains, state: State, standing: Standing) -> tuple[State, Stretch]:
        sizes = domains.num_tokens.double()
        return state, Stretch(sizes / sizes.sum(), domains.every)
