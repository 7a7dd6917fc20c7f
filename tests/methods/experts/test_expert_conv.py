"""What the experts conv promise beyond their kind's contract."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mixtura.methods.experts.conv import Conv
from mixtura.types import LayerShape, RouterInput, Rows

SHAPE = LayerShape(d_model=4, d_expert=6, num_experts=2)


def test_equals_a_causal_depthwise_convolution() -> None:
    bank = Conv(SHAPE, kernel=3)
    with torch.no_grad():
        bank.filters.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    inputs = RouterInput.of(x, sequence_ids=torch.zeros(7, dtype=torch.long), positions=torch.arange(7))
    rows = Rows.of(x, torch.arange(7), torch.ones(7, dtype=torch.long), 2, inputs)
    weight = bank.filters[1].T.flip(-1)[:, None]
    filtered = F.conv1d(F.pad(x.T[None], (2, 0)), weight, groups=4)[0].T
    expected = F.silu(filtered @ bank.up_proj[1].T) @ bank.down_proj[1].T
    torch.testing.assert_close(bank.run(rows).outputs, expected)


def test_begins_as_a_plain_expert() -> None:
    bank = Conv(SHAPE, kernel=3)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    inputs = RouterInput.of(x, sequence_ids=torch.zeros(5, dtype=torch.long), positions=torch.arange(5))
    rows = Rows.of(x, torch.arange(5), torch.zeros(5, dtype=torch.long), 2, inputs)
    expected = F.silu(x @ bank.up_proj[0].T) @ bank.down_proj[0].T
    torch.testing.assert_close(bank.run(rows).outputs, expected)


def test_a_kernel_of_one_remembers_nothing() -> None:
    bank = Conv(SHAPE, kernel=1)
    x = torch.ones(2, 4)
    rows = Rows.of(x, torch.arange(2), torch.zeros(2, dtype=torch.long), 2)
    assert bank.run(rows).history == {}
