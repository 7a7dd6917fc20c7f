"""Experts that stand in for a layer's own for some tokens, run with these in one call.

Each of them is one more expert of the layer. A table turns what the router chose for a token into the expert
that is meant there, so that an expert which several kinds of tokens share is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.kernels.backend import math_of, parameters_of
from mixtura.kernels.compiled import is_plain
from mixtura.kernels.experts import ExpertMath
from mixtura.kernels.few import ExpertMatrices, NativeLayer
from mixtura.kernels.loads import count, loads_of
from mixtura.kernels.matrices import dense_matrix
from mixtura.kernels.records import ExpertTensors
from mixtura.kernels.routed import run_routed


@final
class WovenExperts:
    """An `ExpertStore` of a layer's plain experts and of those that others have in their place.

    Those that stand in for one expert lie behind it, so that a token's experts are added up in the order that
    the layer alone adds them up in.

    Args:
        module: the experts of a transformers module, plain parameters.
        instead: for each place from 1 on, the matrices (``up``, ``down``) by expert that it has of its own.

    Attributes:
        num_experts: of the layer and of all places.
    """

    def __init__(self, module: Any, instead: Sequence[Mapping[int, Mapping[str, Tensor]]]) -> None:
        base, self._math = parameters_of(module), math_of(module)
        self._slots: list[ExpertTensors] = []
        # A last column for choices that are absent.
        table = torch.full((len(instead) + 1, base.num_experts + 1), -1, dtype=torch.long)
        for expert in range(base.num_experts):
            tensors = base.get(expert, base.up.dtype)
            table[:, expert] = len(self._slots)
            self._slots.append(tensors)
            for place, own in enumerate(instead, 1):
                if expert in own:
                    table[place, expert] = len(self._slots)
                    self._slots.append(tensors._replace(**own[expert]))
        self.num_experts = len(self._slots)
        self._table = table.to(base.up.device)
        self._native: NativeLayer | None = None
        self._is_tried = False

    def get(self, expert: int, dtype: torch.dtype) -> ExpertTensors:
        """Views of one expert's weights, in the dtype they have."""
        del dtype
        return self._slots[expert]

    def native_layer(self) -> NativeLayer | None:
        """The experts for the compiled kernels, in place; None where they cannot read them."""
        if not self._is_tried:
            self._is_tried = True
            self._native = self._layer()
        return self._native

    def redirected(self, expert_ids: Int[Tensor, "T K"], places: Int[Tensor, " T"]) -> Int[Tensor, "T K"]:
        """The expert that is meant by each choice of a token of a place; -1 for one that is absent."""
        last = self._table.shape[1] - 1
        known = torch.where((expert_ids >= 0) & (expert_ids < last), expert_ids, last)
        return self._table[places[:, None], known]

    def _layer(self) -> NativeLayer | None:
        experts = []
        for slot in self._slots:
            held = [tensor for tensor in slot if tensor is not None]
            up, down = (dense_matrix(self._math.matrix(one)) for one in (slot.up, slot.down))
            if not is_plain(*held) or any(t.dtype != slot.up.dtype for t in held) or not up or not down:
                return None
            experts.append(ExpertMatrices(up, down, slot.up_bias, slot.down_bias))
        return NativeLayer.of(experts)

    @property
    def math(self) -> ExpertMath:
        """What all experts compute around their matrices."""
        return self._math


def run_woven(
    module: Any,
    woven: WovenExperts,
    places: Int[Tensor, " T"],
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """Run the experts of a transformers module, each token with those of its place; 0 is the layer's own.

    Args:
        module: the experts.
        woven: made of it.
        places: of each token.
        hidden_states: tokens.
        top_k_index: what the router chose, by the layer's own numbers.
        top_k_weights: with what weights.
    """
    loads = loads_of(module)
    if loads is not None:
        count(loads, top_k_index)
    num_tokens, num_chosen = top_k_index.shape
    tokens = torch.arange(num_tokens * num_chosen, device=top_k_index.device) // num_chosen
    ids = woven.redirected(top_k_index, places)
    return run_routed(hidden_states, tokens, ids.reshape(-1), top_k_weights.reshape(-1), woven, woven.math)
