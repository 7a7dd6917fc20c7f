"""What the upcycler split promises beyond its kind's contract."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from mixtura.authoring.contracts._upcycled import FeedForward, made, output_of_layer
from mixtura.errors import UnmetError
from mixtura.methods.upcyclers.split import Split
from mixtura.types.upcycling import Build, DenseShape, UpcycleShape

DENSE = DenseShape(d_model=6, d_ffn=24, num_layers=2)


@pytest.mark.parametrize("order", ["as_is", "shuffled"])
def test_with_all_parts_on_it_is_the_dense_part(order: Literal["as_is", "shuffled"]) -> None:
    shape = UpcycleShape(num_experts=4, top_k=4, seed=1)
    recipe = Split(order=order, router_std=0.0).recipe((DENSE,), shape, None)
    dense = FeedForward.drawn(6, 24, 2)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for layer in range(2):
        torch.testing.assert_close(output_of_layer(recipe, layer, dense, x, 4), dense(x))


def test_every_neuron_is_in_one_expert() -> None:
    recipe = Split().recipe((DENSE,), UpcycleShape(num_experts=4, top_k=1), None)
    for layer in range(2):
        ids = [
            int(n) for a in made(recipe, layer) if isinstance(a, Build) for n in recipe.arrays[str(a.neurons)]
        ]
        assert sorted(ids) == list(range(24))


def test_rescaled_is_as_large_as_with_all_on() -> None:
    shape = UpcycleShape(num_experts=4, top_k=2)
    plain, rescaled = (Split(rescaled=r).recipe((DENSE,), shape, None) for r in (False, True))
    scales = [{a.scale for a in one.actions if isinstance(a, Build)} for one in (plain, rescaled)]
    assert scales == [{2.0}, {4.0}]


def test_numbers_that_do_not_divide_offer_those_that_do() -> None:
    with pytest.raises(UnmetError, match=r"24 wide, which 5 equal parts do not make.*: 3, 4, 6, 8"):
        Split().recipe((DENSE,), UpcycleShape(num_experts=5, top_k=1), None)
