"""What the upcycler random_gates promises beyond its kind's contract."""

from __future__ import annotations

import pytest

from mixtura.errors import UserError
from mixtura.methods.upcyclers.random_gates import RandomGates
from mixtura.types.upcycling import Carry, DenseShape, UpcycleShape

DENSE = DenseShape(d_model=4, d_ffn=8, num_layers=1)


def test_what_is_no_expert_is_the_first_models_or_the_average() -> None:
    shape = UpcycleShape(num_experts=2, top_k=1)
    first, average = (
        RandomGates(rest=rest).recipe((DENSE,) * 2, shape, None) for rest in ("first", "average")
    )
    assert first.actions[0] == Carry((0,), (1.0,))
    assert average.actions[0] == Carry((0, 1), (0.5, 0.5))


def test_experts_are_as_many_as_models() -> None:
    with pytest.raises(UserError, match="2 sources are 2 experts, not 4; leave --experts out"):
        RandomGates().recipe((DENSE,) * 2, UpcycleShape(num_experts=4, top_k=1), None)
