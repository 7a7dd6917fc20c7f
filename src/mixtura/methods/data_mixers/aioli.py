"""Aioli: how much training on one domain helps another, measured as the training goes."""

from __future__ import annotations

from random import Random
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.data_mixers import DataMixer, Domains, Standing, State, Stretch

METHOD = {
    "paper": 160,
    "title": "Aioli: A Unified Optimization Framework for Language Model Data Mixing",
    "tags": ["online"],
}


@final
class Aioli(DataMixer):
    """Learn the data mixture online: short sweeps measure which domain's text lowers which domain's loss.

    A round of ``every`` steps begins with ``sweeps`` sweeps over the G domains in random order. For each
    domain j the training reads, for ``probe_steps`` steps, ``focus`` of it and the rest evenly, the mixture
    P_j; how much each held-out loss i falls meanwhile, on average over the sweeps, is B_ij. Were the fall
    linear in the mixture, B_ij = sum_k A_ik P_jk, and A follows from it by one linear system. Then A is
    shifted to be at least 0, scaled to sum to 1 and averaged with that of earlier rounds (``memory`` is the
    weight of the old), every share is multiplied by exp(``eta`` times its column's sum of A), and the round's
    other steps read these shares. Steps of sweeps train like all others.

    Shapes:
        Losses ``[G]`` of G domains to shares ``[G]``; the state holds A ``[G, G]`` and the sweeps' sums.

    Raises:
        SettingError: a setting is out of range, ``focus`` is not more than an equal share, or the sweeps take
            all of ``every`` steps.

    Example:
        >>> from mixtura.methods.data_mixers import mix
        >>> known = Domains(("code", "prose"), torch.tensor([3.0, 1.0]), 100, 50)
        >>> sorted(mix(Aioli(focus=0.75), known, torch.ones(2)).tolist())
        [0.25, 0.75]

    Differences from the paper:
        The code released with it, wherever it averages A over rounds, starts the shares of each round
        from equal ones; as A then sums to 1, no share is ever more than exp(eta) times another. Here
        shares are multiplied on from round to round, which its code does where it does not average;
        ``restart`` does what it does otherwise. The first round's A is taken as it is; later ones are
        averaged with what is kept. Its code subtracts the sweeps' steps from a round's sequences; here
        sweeps are part of the ``every`` steps. Left out are training with a given mixture before the
        first round, A of its diagonal alone, A without shift and scale, and the start by Skill-It. Where
        all of A is zero, shares stay as they are (its code divides by zero). The order of domains is
        drawn from ``seed`` and the step. The defaults are within what its scripts are described to use
        (eta 0.1 to 0.2, memory 0.1 to 0.5, 2 to 4 sweeps of 4 to 10 steps, focus 0.5 to 0.625, rounds of
        250 steps, here 100 unless ``every`` says otherwise).

    Reference:
        Aioli: A Unified Optimization Framework for Language Model Data Mixing (Chen and others, 2024,
        arXiv 2411.05735; paper 160), and the trainer in the code released with it (HazyResearch/aioli). The
        paper itself was not read.
    """

    def __init__(
        self,
        *,
        eta: float = 0.2,
        sweeps: int = 2,
        probe_steps: int = 4,
        focus: float = 0.625,
        memory: float = 0.1,
        restart: bool = False,
        seed: int = 0,
    ) -> None:
        self.eta = self.within("eta", eta, 0, 100)
        self.sweeps = self.within("sweeps", sweeps, 1, 1 << 20)
        self.probe_steps = self.within("probe_steps", probe_steps, 1, 1 << 20)
        self.focus = self.within("focus", focus, 0, 1)
        self.memory = self.within("memory", memory, 0, 1)
        self.restart, self.seed = restart, seed

    def check(self, domains: Domains) -> None:
        """Refuse rounds that sweeps take all of, and a focus that singles no domain out."""
        taken = self.sweeps * len(domains.names) * self.probe_steps
        if taken >= domains.every:
            raise SettingError(
                f"the sweeps of Aioli take {taken} steps, but a round has {domains.every}; raise every of "
                "the mixture, or lower sweeps or probe_steps"
            )
        if self.focus <= 1 / len(domains.names):
            raise SettingError(
                f"focus of Aioli must be more than an equal share of {len(domains.names)} domains, "
                f"got {self.focus!r}"
            )

    def start(self, domains: Domains) -> State:
        size = len(domains.names)
        zero = torch.zeros(size, size, dtype=torch.float64)
        # "done" counts the probes of this round that are over or running, "rounds" the rounds that are over.
        counts = {name: torch.zeros((), dtype=torch.int64) for name in ("done", "rounds", "begun")}
        before = torch.zeros(size, dtype=torch.float64)
        return {"weights": domains.equal, "matrix": zero, "falls": zero.clone(), "before": before, **counts}

    def next(self, domains: Domains, state: State, standing: Standing) -> tuple[State, Stretch]:
        size, done = len(domains.names), int(state["done"])
        begun = torch.tensor(standing.step) if done == 0 else state["begun"]
        order = self._order(size, int(begun))
        falls = state["falls"].clone()
        if done:
            falls[:, order[done - 1]] += state["before"] - standing.losses
        if done < len(order):
            after = {
                "falls": falls,
                "before": standing.losses.clone(),
                "begun": begun,
                "done": state["done"] + 1,
            }
            return {**state, **after}, Stretch(self._probes(size)[order[done]], self.probe_steps)
        matrix = self._matrix(falls / self.sweeps, state)
        weights = domains.equal if self.restart else state["weights"]
        weights = (weights.log() + self.eta * matrix.sum(0)).softmax(0)
        after = {"weights": weights, "matrix": matrix, "falls": torch.zeros_like(falls)}
        counts = {"done": torch.zeros_like(state["done"]), "rounds": state["rounds"] + 1}
        return {**state, **after, **counts}, Stretch(weights, domains.every - len(order) * self.probe_steps)

    def _order(self, size: int, step: int) -> list[int]:
        """The domains that a round's sweeps go through."""
        draw = Random(f"{self.seed}|{step}")
        return [place for _ in range(self.sweeps) for place in draw.sample(range(size), size)]

    def _probes(self, size: int) -> Float[Tensor, "G G"]:
        """The mixture of each domain's probe, a row each."""
        rest = (1 - self.focus) / (size - 1)
        mixtures = torch.full((size, size), rest, dtype=torch.float64)
        mixtures.fill_diagonal_(self.focus)
        return mixtures

    def _matrix(self, falls: Float[Tensor, "G G"], state: State) -> Float[Tensor, "G G"]:
        """What domain j does for domain i, from what each probe did, with what is remembered of it."""
        found = torch.linalg.solve(self._probes(len(falls)), falls.T).T
        found = found - found.min().clamp(max=0)
        total = found.sum()
        found = found / total if total > 0 else found
        memory = self.memory if int(state["rounds"]) else 0.0
        mixed: Tensor = (1 - memory) * found + memory * state["matrix"]
        return mixed
