"""CLIMB: try mixtures in short runs, predict how the others would do, and try again near the best."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods._drawing import generator_of
from mixtura.methods.data_mixers import DataMixer, Domains, Standing, State, Stretch, place_of
from mixtura.methods.data_mixers._trials import candidates, predicted

METHOD = {
    "paper": 185,
    "title": ("CLIMB: CLustering-based Iterative Data Mixture Bootstrapping for Language Model Pre-training"),
    "tags": ["online"],
}


@final
class Climb(DataMixer):
    """Search for the best data mixture: trials of some, a predictor for all, and more trials near its best.

    The first round tries mixtures from a Dirichlet distribution, ``probe_steps`` steps each, and measures how
    far the held-out loss falls (its mean over domains, or that of the domain ``target``). A ridge regression
    on shares and their squares predicts the fall of any mixture. Each later round tries half as many, drawn
    from the best predicted, and predicts anew. When ``rounds`` are over the rest of the training reads the
    mixture that is predicted best.

    Shapes:
        Losses ``[G]`` of G domains to shares ``[G]``; the state holds the tried mixtures ``[N, G]`` and what
        each did.

    Raises:
        SettingError: a setting is out of range, there is no domain ``target``, or trials take all steps.

    Example:
        >>> from mixtura.methods.data_mixers import mix
        >>> known = Domains(("code", "prose"), torch.tensor([3.0, 1.0]), 200, 50)
        >>> first = mix(Climb(), known, torch.ones(2))
        >>> round(float(first.sum()), 6), bool((first >= 0).all())
        (1.0, True)

    Differences from the paper:
        Domains are those of the training: documents are not embedded, clustered, pruned or merged. The
        paper trains a proxy model for every mixture from one start; here the trials are stretches of the
        training itself, and what the loss was before each is a feature of the regression, since later
        trials start lower. The regression is ridge on shares and squares in place of boosted trees, which
        a dozen trials cannot grow. Trials of a round are in random order, and each mixture of the first
        round is tried in every rotation over the domains, so that a round reads all domains alike.
        The paper is known to halve 64, 32, 16 trials by a summary; here ``draws`` (4) times the number of
        domains, halved. Candidates are drawn from a flat Dirichlet distribution.

    Reference:
        CLIMB: CLustering-based Iterative Data Mixture Bootstrapping for Language Model Pre-training (Diao and
        others, 2025, arXiv 2504.13161; paper 185). Its abstract and summaries were read, the paper was not.
    """

    def __init__(
        self,
        *,
        draws: int = 4,
        rounds: int = 3,
        probe_steps: int = 4,
        penalty: float = 1e-3,
        target: str | None = None,
        seed: int = 0,
    ) -> None:
        self.draws = self.within("draws", draws, 1, 1 << 10)
        self.rounds = self.within("rounds", rounds, 1, 16)
        self.probe_steps = self.within("probe_steps", probe_steps, 1, 1 << 20)
        self.penalty = self.within("penalty", penalty, 1e-12, 1e6)
        self.target, self.seed = target, seed

    def check(self, domains: Domains) -> None:
        """Refuse a target that does not exist, and trials that take the whole training."""
        if self.target is not None:
            place_of(type(self).__name__, self.target, domains)
        taken = sum(self._trials(len(domains.names))) * self.probe_steps
        if taken >= domains.num_steps:
            raise SettingError(
                f"the trials of Climb take {taken} steps, but the training has {domains.num_steps}; "
                "train for more, or lower draws, rounds or probe_steps"
            )

    def start(self, domains: Domains) -> State:
        size, num = len(domains.names), sum(self._trials(len(domains.names)))
        empty = torch.zeros(num, dtype=torch.float64)
        tried = torch.zeros(num, size, dtype=torch.float64)
        done = torch.zeros((), dtype=torch.int64)
        return {"tried": tried, "before": empty, "falls": empty.clone(), "done": done, "best": domains.equal}

    def next(self, domains: Domains, state: State, standing: Standing) -> tuple[State, Stretch]:
        counts, done = self._trials(len(domains.names)), int(state["done"])
        loss = self._loss(domains, standing.losses)
        held = {name: tensor.clone() for name, tensor in state.items()}
        if 0 < done <= sum(counts):
            held["falls"][done - 1] = held["before"][done - 1] - loss
        if done > sum(counts):
            return state, Stretch(state["best"], domains.every)
        held["done"], order = held["done"] + 1, _by_name(domains)
        ends = [sum(counts[: number + 1]) for number in range(len(counts))]
        if done == 0 or done in ends:
            ranked = self._ranked(held, done, order)
            if done == ends[-1]:
                held["best"] = ranked[0]
                return held, Stretch(ranked[0], domains.every)
            number = 0 if done == 0 else ends.index(done) + 1
            held["tried"][done : done + counts[number]] = self._drawn(ranked, counts[number], number, order)
        held["before"][done] = loss
        return held, Stretch(held["tried"][done].clone(), self.probe_steps)

    def _trials(self, size: int) -> list[int]:
        """How many mixtures each round tries: half as many each time, whole rotations."""
        return [size * max(1, self.draws >> number) for number in range(self.rounds)]

    def _loss(self, domains: Domains, losses: Float[Tensor, " G"]) -> Float[Tensor, ""]:
        if self.target is None:
            return losses[_by_name(domains)].mean()
        return losses[place_of(type(self).__name__, self.target, domains)]

    def _ranked(self, state: State, done: int, order: Tensor) -> Float[Tensor, "P G"]:
        """Candidates, the best predicted first; as they are drawn where nothing was tried."""
        pool = candidates(order, self.seed)
        if done == 0:
            return pool[len(order) :]
        tried, before, falls = (state[name][:done] for name in ("tried", "before", "falls"))
        found = predicted(tried[:, order], before, falls, pool[:, order], self.penalty)
        return pool[found.argsort(descending=True, stable=True)]

    def _drawn(
        self, ranked: Float[Tensor, "P G"], num: int, number: int, order: Tensor
    ) -> Float[Tensor, "N G"]:
        """A round's trials: the first draws at first, later some of twice as many of the best."""
        size = len(order)
        generator = generator_of(self.seed + 1 + number)
        blocks = ranked[: num if number == 0 else 2 * num].reshape(-1, size, size)
        chosen = torch.randperm(len(blocks), generator=generator)[: num // size]
        return blocks[chosen].flatten(0, 1)[torch.randperm(num, generator=generator)]


def _by_name(domains: Domains) -> Tensor:
    """The places of the domains in the order of their names."""
    return torch.tensor(sorted(range(len(domains.names)), key=lambda place: domains.names[place]))
