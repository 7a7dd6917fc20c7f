"""Tokens that choose heads beside plain loops, with every way of turning and weighing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods.attentions.plain_heads import one_head

from mixtura.authoring.contracts._attended import SHAPE, gather, text
from mixtura.errors import SettingError
from mixtura.methods.attentions.grouped_query import GroupedQuery
from mixtura.methods.attentions.selective_heads import SelectiveHeads


@pytest.mark.parametrize("weigh", [True, False])
@pytest.mark.parametrize("positions", ["true", "rank"])
def test_equals_plain_loops(weigh: bool, positions: str) -> None:
    method = SelectiveHeads(SHAPE, weigh=weigh, positions=positions, top_heads=3, bias=True, seed=6)
    given, width = text(1), SHAPE.d_head
    with torch.no_grad():
        method.heads.out_bias.normal_(generator=torch.Generator().manual_seed(1))
    found = gather(method, given)[0]
    for row in range(2):
        x = given.x[row]
        gates = (x.double() @ method.gate.double().T).softmax(-1)
        chosen = [sorted(range(4), key=lambda h, t=t: -float(gates[t, h]))[:3] for t in range(len(x))]
        wanted = torch.zeros(len(x), SHAPE.d_model, dtype=torch.float64)
        for head in range(4):
            members = [t for t in range(len(x)) if head in chosen[t]]
            inwards = method.heads.inwards[head].split(width)
            places = members if positions == "true" else list(range(len(members)))
            for t, values in one_head(x, inwards, members, places).items():
                made = method.heads.outwards[head].double() @ values + method.heads.out_bias[head].double()
                share = 3 * gates[t, head] / sum(gates[t, h] for h in chosen[t])
                wanted[t] += made * (share if weigh else 1.0)
        torch.testing.assert_close(found[row].double(), wanted, rtol=1e-4, atol=1e-5)


def test_with_all_heads_it_is_multi_head_attention() -> None:
    method, width = SelectiveHeads(SHAPE, top_heads=4, weigh=False, query_key_norm="head"), SHAPE.d_head
    ordinary = GroupedQuery(replace(SHAPE, num_key_value_heads=4), query_key_norm="head")
    with torch.no_grad():
        parts = method.heads.inwards.split(width, dim=1)
        for part, linear in zip(parts, (ordinary.q_proj, ordinary.k_proj, ordinary.v_proj), strict=True):
            linear.weight.copy_(part.reshape(linear.weight.shape))
        ordinary.o_proj.weight.copy_(method.heads.outwards.transpose(0, 1).reshape(SHAPE.d_model, -1))
    for positions in ("true", "rank"):
        method.heads.positions = positions
        torch.testing.assert_close(
            gather(method, text(2))[0], gather(ordinary, text(2))[0], rtol=1e-4, atol=1e-5
        )


def test_weights_have_a_mean_of_one_over_a_tokens_heads() -> None:
    routing = gather(SelectiveHeads(SHAPE), text(3))[2]
    assert routing is not None
    sums = torch.zeros(26).index_add_(0, routing.token_ids, routing.weights)
    torch.testing.assert_close(sums, torch.full((26,), 2.0))


def test_gates_learn_only_where_they_weigh() -> None:
    for weigh in (True, False):
        method = SelectiveHeads(SHAPE, weigh=weigh)
        torch.autograd.backward(gather(method, replace(text(4), training=True))[0].square().sum())
        assert (method.gate.grad is not None) == weigh


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingError, match=r"top_heads of SelectiveHeads must be in \[1, 4\]"):
        SelectiveHeads(SHAPE, top_heads=5)
