"""What the upcycler innovator promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.authoring.contracts._upcycled import FeedForward, output_of_layer
from mixtura.errors import UnmetError
from mixtura.methods.upcyclers.innovator import Innovator
from mixtura.types.upcycling import Build, DenseShape, UpcycleShape

DENSE = DenseShape(d_model=6, d_ffn=24, num_layers=1)


def test_at_scale_zero_it_is_the_general_model() -> None:
    recipe = Innovator(scale=0.0).recipe((DENSE,) * 3, UpcycleShape(num_experts=8, top_k=2), None)
    dense = FeedForward.drawn(6, 24, 2)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(output_of_layer(recipe, 0, dense, x, 2), dense(x))


def test_disciplines_are_cut_whole() -> None:
    recipe = Innovator().recipe((DENSE,) * 3, UpcycleShape(num_experts=8, top_k=2), None)
    for source in (1, 2):
        parts = [a.neurons for a in recipe.actions if isinstance(a, Build) and a.source == source]
        assert parts == [(0, 6), (6, 12), (12, 18), (18, 24)]


def test_numbers_that_models_cannot_share_are_refused() -> None:
    with pytest.raises(UnmetError, match=r"2 models .* cannot share 5 experts equally; give --experts 4"):
        Innovator().recipe((DENSE,) * 3, UpcycleShape(num_experts=5, top_k=1), None)
