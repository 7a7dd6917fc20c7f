"""What the adapter rocket promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from methods.adapters.adapter_inputs import X, added, best, loras, softmax
from methods.adapters.adapter_sites import linear_site

from mixtura.adapting.changing import low_rank_rows
from mixtura.errors import UserError
from mixtura.methods import load_method
from mixtura.types import RouterInput


def test_rocket_gives_the_best_two_of_its_library() -> None:
    made = load_method("adapters", "rocket")(linear_site(2), rank=3, alpha=6.0, num_experts=3).double()
    library = loras([3, 1, 2])
    made.take(library)
    shares = [best(softmax((made.gate @ x).tolist()), 2) for x in X]
    assert all(sum(one > 0 for one in row) == 2 for row in shares)
    wanted = torch.zeros(7, 20, dtype=torch.float64)
    for token, x in enumerate(X):
        for share, one in zip(shares[token], library, strict=True):
            part = one["weight"]
            wanted[token] += share * float(part.scale) * (part.b[0].double() @ (part.a[0].double() @ x))
    torch.testing.assert_close(added(made.change(RouterInput.of(X))), wanted, rtol=1e-6, atol=1e-6)


def test_a_library_of_one_lora_many_times_is_that_lora() -> None:
    made = load_method("adapters", "rocket")(linear_site(2), rank=3).double()
    library = loras([2])
    made.take(library * 4)
    whole = low_rank_rows(X.float(), library[0]["weight"], None)
    found = added(made.change(RouterInput.of(X)))
    torch.testing.assert_close(found.float(), whole, rtol=1e-5, atol=1e-5)


def test_a_library_that_does_not_fit_is_refused() -> None:
    made = load_method("adapters", "rocket")(linear_site(2), rank=3)
    with pytest.raises(UserError, match="num_experts=3"):
        made.take(loras([2, 2, 2]))
    with pytest.raises(UserError, match="rank 9"):
        made.take(loras([2, 2, 9, 2]))
    with pytest.raises(UserError, match="takes_library"):
        load_method("adapters", "lora")(linear_site()).take(loras([2]))
