"""What the upcycler sparse_unified_model promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import torch

from mixtura.authoring.contracts import sample_dense_trace
from mixtura.authoring.contracts._upcycled import FeedForward, output_of_layer
from mixtura.methods.upcyclers.sparse_unified_model import SparseUnifiedModel
from mixtura.types.upcycling import Build, DenseShape, DenseTrace, Recipe, UpcycleShape

DENSE = DenseShape(d_model=6, d_ffn=20, num_layers=1)


def recipe_of(activations: torch.Tensor, **settings: float) -> Recipe:
    trace: DenseTrace = sample_dense_trace(DENSE)
    trace = replace(trace, layers=(replace(trace.layers[0], activations=activations),))
    return SparseUnifiedModel(**settings).recipe((DENSE,), UpcycleShape(num_experts=3, top_k=3), trace)


def test_important_neurons_are_shared_and_the_others_dealt_forth_and_back() -> None:
    recipe = recipe_of(torch.arange(20).float())
    groups = [recipe.arrays[str(a.neurons)].tolist() for a in recipe.actions if isinstance(a, Build)]
    # Nine of the ten least important make three experts of three; the rest is shared.
    assert groups[0] == list(range(9, 20))
    assert groups[1:] == [[2, 3, 8], [1, 4, 7], [0, 5, 6]]


def test_with_all_experts_on_it_is_the_dense_part() -> None:
    recipe = recipe_of(torch.rand(20, generator=torch.Generator().manual_seed(1)), router_std=0.0)
    dense = FeedForward.drawn(6, 20, 2)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(output_of_layer(recipe, 0, dense, x, 3), dense(x))
