"""CMoE: shared neurons for every token, the others in balanced clusters, and a router without training."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._balanced import balanced
from mixtura.methods.upcyclers._shared import needed, parts_of
from mixtura.types import Action
from mixtura.types.upcycling import (
    Build,
    Carry,
    DenseShape,
    DenseTrace,
    Fill,
    Recipe,
    UpcycleShape,
    array_name,
)

METHOD = {
    "paper": 80,
    "title": "CMoE: Fast Carving of Mixture-of-Experts for Efficient LLM Inference",
    "tags": ["own", "reads:largest"],
}


@final
class CMoe(Upcycler):
    """Carve experts out of a feed-forward part by which neurons are active together, router included.

    Each token of calibration text marks its ten neurons of largest activation (inputs and rows of gate and up
    made of length one). The neurons that are marked most often make the shared expert, as wide as ``shared``
    experts. The others are clustered by which tokens mark them, with equal sizes (L1 distances, an exact
    linear assignment). The neuron nearest to a cluster's centre represents it: the router has its rows of
    gate and up. Each expert counts in full, so that with all of them on the model is the dense one.

    Shapes:
        A source of L layers to E experts of F / (E + shared) neurons, and one of ``shared`` times as many.

    Raises:
        SettingError: ``shared`` is not in [1, 1024], or ``rounds`` not in [1, 100].
        UnmetError: the feed-forward part is not divisible by E + ``shared``.
        UserError: there is no text.

    Example:
        >>> from mixtura.authoring.contracts import sample_dense_trace
        >>> dense = DenseShape(d_model=4, d_ffn=12, num_layers=1)
        >>> trace = sample_dense_trace(dense, seed=0)
        >>> recipe = CMoe(shared=1).recipe((dense,), UpcycleShape(num_experts=2, top_k=1), trace)
        >>> [len(recipe.arrays[action.neurons]) for action in recipe.actions[1:4]]
        [4, 4, 4]

    Differences from the paper:
        ``--experts`` are those that tokens are routed to, without the shared ones: the paper's 16 of which 2
        are shared are 14 here. Each layer sees what the dense layers before it put out; there what the carved
        ones did. Neurons that no token marked have all the same distances, and which of them goes where is
        arbitrary in both. The released code moves the centres after the one round of clustering, and picks
        representatives by the moved ones; so here. How many are marked, ten, is fixed. Fine-tuning
        afterwards, there for an epoch with LoRA, is `mixtura train` or `tune`.

    Reference:
        CMoE: Fast Carving of Mixture-of-Experts for Efficient LLM Inference (paper 80); repository
        JarvisPei/CMoE, ``CMoE_utils.py``.
    """

    def __init__(self, *, shared: int = 2, rounds: int = 1) -> None:
        check_range("CMoe", "shared", shared, 1, 1024)
        check_range("CMoe", "rounds", rounds, 1, 100)
        self.shared, self.rounds = shared, rounds

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        dense, number = sources[0], shape.num_experts
        width = parts_of(dense.d_ffn, number + self.shared, "the feed-forward part")
        actions: list[Action] = [Carry((0,), (1.0,))]
        arrays: list[Tensor] = []
        for layer, seen in enumerate(needed(trace, "CMoe").layers):
            if seen.largest is None:
                raise UserError("this trace has not the largest activations; trace again asking for them")
            marks = _marks(seen.largest, dense.d_ffn)
            groups, stand = self._groups(marks, number, width)
            for expert, ids in zip((None, *range(number)), groups, strict=True):
                arrays.append(ids.int())
                actions.append(Build(layer, expert, 0, array_name(arrays[-1])))
            arrays.append(stand.int())
            rows = array_name(arrays[-1])
            actions.append(Fill(layer, "gate", matrix="gate", rows=rows, unit=True))
            actions.append(Fill(layer, "up", matrix="up", rows=rows, unit=True))
        router = {"name": "c_moe", "top_k": shape.top_k, "start": 0.0}
        return Recipe.of(actions, arrays, {"moe": {"router": router, "balancers": ["loss_free"]}})

    def _groups(
        self, marks: Float[Tensor, "F T"], number: int, width: int
    ) -> tuple[list[Int[Tensor, " M"]], Int[Tensor, " E"]]:
        """Neurons of the shared expert and of each other, and the one that stands for each other."""
        rates = torch.sparse.sum(marks, dim=1).to_dense()
        ordered = rates.argsort(descending=True, stable=True)
        shared, rest = ordered[: width * self.shared].sort().values, ordered[width * self.shared :]
        own = marks.index_select(0, rest)
        centres = own.index_select(0, torch.arange(number)).to_dense()
        rest_of = torch.zeros(len(rest), dtype=torch.long)
        for _ in range(self.rounds):
            rest_of = balanced(_distances(own, centres))
            mean = torch.nn.functional.one_hot(rest_of, number).float() / width
            centres = torch.sparse.mm(own.t(), mean).T
        apart = _distances(own, centres)
        groups = [rest[rest_of == expert] for expert in range(number)]
        nearest = (apart[rest_of == expert, expert].argmin() for expert in range(number))
        stand = [ids[place] for ids, place in zip(groups, nearest, strict=True)]
        return [shared, *(ids.sort().values for ids in groups)], torch.stack(stand)


def _marks(largest: Int[Tensor, "T J"], d_ffn: int) -> Float[Tensor, "F T"]:
    """1 where a token marks a neuron, without the zeros."""
    tokens = torch.arange(len(largest)).repeat_interleave(largest.shape[1])
    places = torch.stack([largest.reshape(-1).long(), tokens])
    size = (d_ffn, len(largest))
    made = torch.sparse_coo_tensor(places, torch.ones(len(tokens)), size, check_invariants=True)
    whole: Tensor = made.coalesce()
    return whole


def _distances(marks: Float[Tensor, "N T"], centres: Float[Tensor, "E T"]) -> Float[Tensor, "N E"]:
    """L1 distances of rows of zeros and ones to centres of numbers in [0, 1]."""
    found: Tensor = centres.sum(1) + torch.sparse.mm(marks, 1 - 2 * centres.T)
    return found
