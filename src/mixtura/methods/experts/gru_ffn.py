"""Hecto's experts: feed-forward ones and recurrent ones in one layer."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.methods.experts import Bank
from mixtura.methods.experts._shared import begun, drawn_matrices, grouped
from mixtura.types import LayerShape, Ran, Rows

METHOD = {
    "paper": 151,
    "title": "Hecto: Modular Sparse Experts for Adaptive and Interpretable Reasoning",
    "tags": ["reads:sequence_ids", "reads:positions", "reads:history"],
}


@final
class GruFfn(Bank):
    """Experts of two kinds: those of even number are feed-forward with tanh, those of odd number are GRUs.

    Both end in a matrix that writes the output. With ``memory="none"`` a GRU makes one step from a state of
    zeros for each token; with ``"sequence"`` it goes on over those tokens of a sequence that are sent to it,
    in order, and its state is remembered beside the cache when text is generated. Steps of all sequences and
    all such experts are made together, so that time grows with the longest run of tokens one of them gets.

    Shapes:
        ``x [N, D]`` to ``[N, D]``. Feed-forward: ``up [F, D]`` and a bias. GRU: ``[3F, D]``, with memory
        ``[3F, F]``, and two biases of 3F, gates in the order of `torch.nn.GRU`. All: ``down_proj [E, D, F]``.

    Raises:
        SettingError: ``memory`` is unknown.

    Example:
        >>> bank = GruFfn(LayerShape(d_model=4, d_expert=2, num_experts=2))
        >>> sum(one.numel() for one in bank.parameters())  # 2*4 + 2, 6*4 + 12, 2*4*2
        62

    Differences from the paper:
        There one expert of each kind classifies a text by its first vector, with a matrix from F features to
        classes; here experts are of a layer, and end in the model's width. Memory over a sequence is ours:
        the paper's inputs are single vectors, so that its GRU makes one step.

    Reference:
        Hecto: Modular Sparse Experts for Adaptive and Interpretable Reasoning (paper 151, abstract and a
        model card).
    """

    def __init__(
        self, shape: LayerShape, *, memory: Literal["none", "sequence"] = "none", seed: int = 0
    ) -> None:
        super().__init__(shape)
        self.memory = memory
        self.seed = seed
        width, model = shape.d_expert, shape.d_model
        plain, recurrent = (shape.num_experts + 1) // 2, shape.num_experts // 2
        generator = begun(seed)
        self.up_proj = drawn_matrices(generator, plain, width, model)
        self.up_bias = nn.Parameter(torch.zeros(plain, width))
        self.input_gates = drawn_matrices(generator, recurrent, 3 * width, model)
        # One step from a state of zeros has no use for them.
        remembers = memory == "sequence"
        self.state_gates = drawn_matrices(generator, recurrent, 3 * width, width) if remembers else None
        self.input_bias, self.state_bias = (nn.Parameter(torch.zeros(recurrent, 3 * width)) for _ in range(2))
        self.down_proj = drawn_matrices(generator, shape.num_experts, model, width)

    def num_used(self, num_chosen: float) -> float:
        # That of the mean of both kinds.
        held = sum(one.numel() for one in self.parameters())
        return held * num_chosen / self.shape.num_experts

    def run(self, rows: Rows) -> Ran:
        odd = rows.expert_ids % 2 == 1
        kind = rows.expert_ids // 2
        even_rows, odd_rows = (~odd).nonzero().squeeze(-1), odd.nonzero().squeeze(-1)
        x = rows.gathered
        flat = torch.tanh(_of(x[even_rows], kind[even_rows], self.up_proj, self.up_bias))
        hidden = flat.new_zeros(x.shape[0], self.shape.d_expert).index_copy(0, even_rows, flat)
        history: dict[str, Tensor] = {}
        if self.memory == "none":
            state = x.new_zeros(odd_rows.numel(), self.shape.d_expert)
            stepped = self._step(x[odd_rows], state, kind[odd_rows])
        else:
            stepped, history = self._over_sequences(rows, x[odd_rows], kind[odd_rows], odd_rows)
        hidden = hidden.index_copy(0, odd_rows, stepped.to(hidden.dtype))
        return Ran(grouped(hidden, self.down_proj, rows.offsets), history)

    def _step(
        self, x: Float[Tensor, "n D"], state: Float[Tensor, "n F"], kind: Int[Tensor, " n"]
    ) -> Float[Tensor, "n F"]:
        """The next state of a GRU for each row, with the weights of its expert; rows sorted by expert."""
        read = _of(x, kind, self.input_gates, self.input_bias).chunk(3, dim=-1)
        added = self.state_bias[kind]
        if self.state_gates is not None:
            added = _of(state, kind, self.state_gates, self.state_bias)
        kept = added.chunk(3, dim=-1)
        reset, update = (torch.sigmoid(a + b) for a, b in zip(read[:2], kept[:2], strict=True))
        new = torch.tanh(read[2] + reset * kept[2])
        return (1 - update) * new + update * state

    def _over_sequences(
        self, rows: Rows, x: Float[Tensor, "n D"], kind: Int[Tensor, " n"], odd_rows: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n F"], dict[str, Tensor]]:
        """States after each row, and those of every sequence and expert at the end ``[S, G, F]``."""
        sequences = rows.inputs.sequences
        owner, count = sequences[rows.token_ids[odd_rows]], self.input_gates.shape[0]
        past = rows.inputs.history.get("states")
        total = max(int(sequences.max()) + 1 if sequences.numel() else 0, 0 if past is None else len(past))
        state = x.new_zeros(total, count, self.shape.d_expert)
        if past is not None:
            state = torch.cat([past.to(state), state[len(past) :]])
        key = kind * max(total, 1) + owner
        turns = _place_in_run(key, rows.inputs.need("positions", "GruFfn")[rows.token_ids[odd_rows]])
        stepped = x.new_zeros(x.shape[0], self.shape.d_expert)
        for turn in range(int(turns.max()) + 1 if turns.numel() else 0):
            now = (turns == turn).nonzero().squeeze(-1)
            places = owner[now], kind[now]
            made = self._step(x[now], state[places], kind[now])
            state, stepped = state.index_put(places, made), stepped.index_copy(0, now, made)
        return stepped, {"states": state}


def _of(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each row times the matrix of its number, with its bias; rows are sorted by number."""
    return grouped(x, weight, torch.bincount(ids, minlength=len(weight)).cumsum(0), bias)


def _place_in_run(key: Int[Tensor, " n"], positions: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Each row's place, by position, among the rows of its key, from 0."""
    order = torch.argsort(positions, stable=True)
    order = order[torch.argsort(key[order], stable=True)]
    _, counts = key[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.empty_like(key).scatter(0, order, torch.arange(len(key), device=key.device) - starts)
