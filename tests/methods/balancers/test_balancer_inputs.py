"""What is of the wrong shape is said in one sentence, whichever balancer it is meant for."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from mixtura.authoring.contracts import sample_routing
from mixtura.authoring.contracts._inputs import experts
from mixtura.errors import UserError
from mixtura.types import BalancerInput

ROUTING = sample_routing()


# Where tests check types at run time, a wrong type is caught before the record looks at it.
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"load": torch.ones(7)}, "load of BalancerInput must have one entry for each of 8 experts"),
        ({"loads": torch.ones(2, 7)}, "loads of BalancerInput must have a row of 8 experts"),
        ({"sequence_ids": torch.zeros(63, dtype=torch.long)}, "one entry for each of 64 tokens"),
        ({"gradients": torch.ones(7, 5)}, "gradients of BalancerInput must have one row for each of 8"),
        (
            {"router_weight": torch.ones(8, 15), "experts": experts(0)},
            "router_weight of BalancerInput must have one row of 16 features for each of 8 experts",
        ),
    ],
)
def test_fields_of_another_size_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        BalancerInput(routing=ROUTING, **fields)


PLAIN = """
import torch
from dataclasses import replace
from mixtura.authoring.contracts import sample_routing
from mixtura.errors import UserError
for fields in (
    {"logits": torch.ones(64, 7)}, {"valid": torch.ones(63, dtype=torch.bool)},
    {"valid": torch.ones(64, dtype=torch.long)}, {"weights": torch.ones(3)},
):
    try:
        replace(sample_routing(), **fields)
    except UserError as error:
        print(error)
"""


def test_a_routing_whose_parts_do_not_fit_is_refused() -> None:
    """In a process without the tests' own checks of types, as users run it."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], capture_output=True, text=True, timeout=120, check=True
    )
    said = done.stdout.splitlines()
    assert len(said) == 4
    wanted = ("both be [T, E]", "valid [T]", "must be true or false", "one entry an assignment each")
    assert all(part in line for part, line in zip(wanted, said, strict=True))
