"""What the experts gru_ffn promise beyond their kind's contract."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixtura.methods.experts.gru_ffn import GruFfn
from mixtura.types import LayerShape, RouterInput, Rows

SHAPE = LayerShape(d_model=4, d_expert=3, num_experts=4)


def made() -> GruFfn:
    bank = GruFfn(SHAPE, memory="sequence")
    with torch.no_grad():
        for number, one in enumerate((bank.input_bias, bank.state_bias, bank.up_bias)):
            one.normal_(generator=torch.Generator().manual_seed(number))
    return bank


def torch_gru(bank: GruFfn, number: int) -> nn.GRU:
    gru = nn.GRU(4, 3)
    assert bank.state_gates is not None
    with torch.no_grad():
        gru.weight_ih_l0.copy_(bank.input_gates[number])
        gru.weight_hh_l0.copy_(bank.state_gates[number])
        gru.bias_ih_l0.copy_(bank.input_bias[number])
        gru.bias_hh_l0.copy_(bank.state_bias[number])
    return gru


def rows_of(x: Tensor, positions: Tensor, experts: Tensor, history: dict[str, Tensor] | None = None) -> Rows:
    """Two sequences' tokens, position by position, each at one expert."""
    inputs = RouterInput.of(
        x, sequence_ids=torch.arange(len(x)) % 2, positions=positions, history=history or {}
    )
    order = torch.sort(experts, stable=True).indices
    return Rows.of(x, order, experts[order], 4, inputs)


def test_equals_the_gru_of_torch_over_the_rows_of_a_sequence() -> None:
    bank = made()
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(9))
    experts = torch.tensor([1, 3, 0, 1, 1, 3, 1, 0, 3, 3, 1, 3])
    rows = rows_of(x, torch.arange(12) // 2, experts)
    outputs = bank.run(rows).outputs
    for number, expert in ((0, 1), (1, 3)):
        for sequence in (0, 1):
            mine = ((rows.expert_ids == expert) & (rows.token_ids % 2 == sequence)).nonzero().squeeze(-1)
            states, _ = torch_gru(bank, number)(x[rows.token_ids[mine]])
            torch.testing.assert_close(outputs[mine], states @ bank.down_proj[expert].T)
    plain = (rows.expert_ids == 0).nonzero().squeeze(-1)
    hidden = torch.tanh(x[rows.token_ids[plain]] @ bank.up_proj[0].T + bank.up_bias[0])
    torch.testing.assert_close(outputs[plain], hidden @ bank.down_proj[0].T)


def test_memory_goes_on_in_later_calls_and_never_looks_ahead() -> None:
    bank = made()
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(9))
    positions, experts = torch.arange(12) // 2, torch.tensor([1, 3, 0, 1, 1, 3, 1, 0, 3, 3, 1, 3])
    whole = rows_of(x, positions, experts)
    outputs = torch.zeros(12, 4).index_copy(0, whole.token_ids, bank.run(whole).outputs)
    history: dict[str, Tensor] = {}
    for begins, end in ((0, 4), (4, 6), (6, 12)):
        part = rows_of(x[begins:end], positions[begins:end], experts[begins:end], history)
        ran = bank.run(part)
        history = dict(ran.history)
        torch.testing.assert_close(ran.outputs, outputs[begins:end][part.token_ids])


def test_without_memory_each_token_is_one_step_from_zeros() -> None:
    remembering = made()
    bank = GruFfn(SHAPE)
    bank.load_state_dict({k: v for k, v in remembering.state_dict().items() if k != "state_gates"})
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    rows = Rows.of(x, torch.arange(3), torch.full((3,), 1), 4)
    expected = torch.cat([torch_gru(remembering, 0)(row[None])[0] for row in x]) @ bank.down_proj[1].T
    torch.testing.assert_close(bank.run(rows).outputs, expected)
    assert bank.run(rows).history == {}
