"""Grouped-query attention beside plain loops over heads, groups and windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods.attentions.plain_heads import one_head

from mixtura.authoring.contracts._attended import SHAPE, gather, piecewise, text
from mixtura.errors import SettingError
from mixtura.methods.attentions.grouped_query import GroupedQuery
from mixtura.types import AttentionShape


@pytest.mark.parametrize("window", [None, 1, 4])
def test_equals_plain_loops(window: int | None) -> None:
    method, given = GroupedQuery(SHAPE, window=window, seed=3), text(0)
    found = gather(method, given)[0]
    width, places = SHAPE.d_head, given.x.shape[1]
    for row in range(2):
        wanted = torch.zeros(places, SHAPE.d_model, dtype=torch.float64)
        for head in range(SHAPE.num_heads):
            group = head // SHAPE.num_groups
            own, shared = (slice(n * width, (n + 1) * width) for n in (head, group))
            weights = (method.q_proj.weight[own], method.k_proj.weight[shared], method.v_proj.weight[shared])
            everyone = list(range(places))
            gathered = one_head(given.x[row], weights, everyone, everyone, window or 10**9)
            for place, values in gathered.items():
                wanted[place] += method.o_proj.weight[:, own].double() @ values
        torch.testing.assert_close(found[row].double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_window_as_long_as_the_text_is_no_window() -> None:
    whole, narrow = (GroupedQuery(SHAPE, window=window) for window in (None, 13))
    torch.testing.assert_close(gather(whole, text(1))[0], gather(narrow, text(1))[0])


def test_a_window_counts_from_a_documents_start_and_goes_on_when_decoding() -> None:
    method = GroupedQuery(SHAPE, window=3)
    given = text(2)
    torch.testing.assert_close(piecewise(method, given, range(1, 13)), gather(method, given)[0])
    apart = replace(given, position_ids=torch.cat([torch.arange(2), torch.arange(11)])[None].expand(2, -1))
    torch.testing.assert_close(
        gather(method, apart)[0][:, 2:], gather(method, replace(given, x=given.x[:, 2:]))[0]
    )


def test_bad_settings_are_named() -> None:
    with pytest.raises(SettingError, match="window of GroupedQuery"):
        GroupedQuery(SHAPE, window=0)
    with pytest.raises(SettingError, match="num_attention_heads must be a multiple of num_key_value_heads"):
        AttentionShape(d_model=8, num_heads=3, num_key_value_heads=2, d_head=4)
    with pytest.raises(SettingError, match="head_dim must be even"):
        AttentionShape(d_model=8, num_heads=2, num_key_value_heads=2, d_head=3)
