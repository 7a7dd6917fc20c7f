"""DMT: special abilities first, then general text with a little of what came before."""

from __future__ import annotations

from typing import final

from mixtura.errors import SettingError
from mixtura.methods.data_mixers import DataMixer, Domains, Standing, State, Stretch, place_of

METHOD = {
    "paper": 147,
    "title": "How Abilities in Large Language Models are Affected by Supervised Fine-tuning Data Composition",
    "tags": ["schedule"],
}


@final
class Dmt(DataMixer):
    """Train on special domains first, then on the general one with a fraction of the special ones again.

    Dual-stage mixed fine-tuning, against forgetting: the first ``first`` of the steps read the special
    domains, in proportion to their sizes; the others read the domain ``general``, by default the largest,
    and of each special domain ``fraction`` of what the first stage read. With ``fraction`` 0 it is sequential
    training.

    Shapes:
        Losses ``[G]`` of G domains to shares ``[G]``.

    Raises:
        SettingError: a setting is out of range, there is no domain ``general``, or the second stage has fewer
            steps than it is to repeat.

    Example:
        >>> import torch
        >>> from mixtura.methods.data_mixers import mix
        >>> known = Domains(("code", "prose", "tasks"), torch.tensor([3.0, 6.0, 1.0]), 100, 50)
        >>> mix(Dmt(), known, torch.ones(3)).tolist()
        [0.75, 0.0, 0.25]

    Differences from the paper:
        The paper fine-tunes a trained model on mathematics and code, then on instructions, each stage for
        epochs of its data; here the stages of any training are parts of its steps. It repeats a fraction
        of the special examples themselves; here the second stage goes on in the special domains' text, so
        much of it as ``fraction`` of what the first read. The default 1/256 is known from a summary;
        ``first``, and that the largest domain is the general one, are ours.

    Reference:
        How Abilities in Large Language Models are Affected by Supervised Fine-tuning Data Composition
        (paper 147). Its abstract and a summary were read, the paper was not; the repository that is named
        for it is described to have no code of this method.
    """

    def __init__(self, *, general: str | None = None, first: float = 0.5, fraction: float = 1 / 256) -> None:
        self.general = general
        self.first = self.within("first", first, 0, 1)
        self.fraction = self.within("fraction", fraction, 0, 1)

    def check(self, domains: Domains) -> None:
        """Refuse domains without the general one, or a second stage without room for what is repeated."""
        self._general(domains)
        begin = self._begin(domains)
        if self.fraction * begin > domains.num_steps - begin:
            raise SettingError(
                f"fraction of Dmt repeats {self.fraction * begin:g} steps, but the second stage has "
                f"{domains.num_steps - begin}; lower fraction or first"
            )

    def next(self, domains: Domains, state: State, standing: Standing) -> tuple[State, Stretch]:
        general, begin = self._general(domains), self._begin(domains)
        special = domains.num_tokens.double().clone()
        special[general] = 0.0
        special /= special.sum()
        if standing.step < begin:
            return state, Stretch(special, min(domains.every, begin - standing.step))
        again = self.fraction * begin / (domains.num_steps - begin)
        weights = special * again
        weights[general] = 1 - again
        return state, Stretch(weights, domains.every)

    def _general(self, domains: Domains) -> int:
        """The place of the general domain."""
        if self.general is None:
            return int(domains.num_tokens.argmax())
        return place_of(type(self).__name__, self.general, domains)

    def _begin(self, domains: Domains) -> int:
        """The step at which general text begins."""
        return round(self.first * domains.num_steps)
