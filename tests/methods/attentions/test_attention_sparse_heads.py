"""Heads that choose tokens beside plain loops, and the rule by which they choose when text is to come."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods.attentions.plain_heads import one_head
from torch import Tensor
from transformers import DynamicCache

from mixtura.authoring.contracts._attended import SHAPE, Text, config, gather, text
from mixtura.errors import SettingError
from mixtura.methods.attentions.grouped_query import GroupedQuery
from mixtura.methods.attentions.sparse_heads import SparseHeads
from mixtura.modeling.cache import recall

PLACES = 13


def members_in_training(scores: list[float], sparsity: int, first: bool) -> list[int]:
    """The tokens of a head, chosen among all."""
    num = min(max(len(scores) // sparsity, 2), len(scores))
    order = sorted(range(len(scores)), key=lambda t: (-scores[t], t))
    if first:
        order = [0, *(t for t in order if t)]
    return sorted(order[:num])


def members_at_inference(scores: list[float], sparsity: int, first: bool) -> list[int]:
    """The tokens of a head, each chosen among those up to it."""
    return [t for t in range(len(scores)) if t in members_in_training(scores[: t + 1], sparsity, first)]


def plain(method: SparseHeads, x: Tensor, training: bool) -> Tensor:
    """What one row gathers in the heads that choose, in float64."""
    width = SHAPE.d_head
    wanted = torch.zeros(len(x), SHAPE.d_model, dtype=torch.float64)
    for head in range(len(method.gate)):
        scores = torch.sigmoid(x.double() @ method.gate[head].double())
        rule = members_in_training if training else members_at_inference
        members = rule(scores.tolist(), method.sparsity, method.include_first)
        inwards = method.sparse.inwards[head]
        weights = (inwards[:width], inwards[width : 2 * width], inwards[2 * width :])
        for place, values in one_head(x, weights, members, members).items():
            wanted[place] += scores[place] * (method.sparse.outwards[head].double() @ values)
    return wanted


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("sparsity", [1, 3, 100])
def test_equals_plain_loops(training: bool, first: bool, sparsity: int) -> None:
    method = SparseHeads(SHAPE, sparsity=sparsity, include_first=first, seed=4)
    given = text(1)
    found = gather(method, replace(given, training=training))[0]
    for row in range(2):
        wanted = plain(method, given.x[row], training)
        torch.testing.assert_close(found[row].double(), wanted, rtol=1e-4, atol=1e-5)


def test_with_everything_chosen_and_scores_of_one_it_is_multi_head_attention() -> None:
    method, width = SparseHeads(SHAPE, sparsity=1), SHAPE.d_head
    ordinary = GroupedQuery(replace(SHAPE, num_key_value_heads=SHAPE.num_heads))
    given = text(2)
    # A feature that is large in all tokens and that only gates look at.
    given.x[..., 0] = 50.0
    with torch.no_grad():
        method.gate.zero_()[:, 0] = 1.0
        method.sparse.inwards[..., 0] = 0.0
        parts = method.sparse.inwards.split(width, dim=1)
        for part, linear in zip(parts, (ordinary.q_proj, ordinary.k_proj, ordinary.v_proj), strict=True):
            linear.weight.copy_(part.reshape(linear.weight.shape))
        ordinary.o_proj.weight.copy_(method.sparse.outwards.transpose(0, 1).reshape(SHAPE.d_model, -1))
    for training in (True, False):
        torch.testing.assert_close(
            gather(method, replace(given, training=training))[0],
            gather(ordinary, given)[0],
            rtol=1e-4,
            atol=1e-5,
        )


def test_ordinary_heads_are_added() -> None:
    both, given = SparseHeads(SHAPE, num_dense=2, seed=1), text(3)
    sizes = replace(SHAPE, num_heads=2, num_key_value_heads=2)
    dense = GroupedQuery(sizes)
    dense.load_state_dict({name: value for name, value in both.state_dict().items() if name[1:6] == "_proj"})
    added = gather(both, given)[0] - gather(dense, given)[0]
    for row in range(2):
        torch.testing.assert_close(
            added[row].double(), plain(both, given.x[row], False), rtol=1e-4, atol=1e-5
        )


def test_each_document_chooses_its_own_share() -> None:
    method, given = SparseHeads(SHAPE, sparsity=4), text(4, places=20)
    places = torch.cat([torch.arange(12), torch.arange(8)])[None].expand(2, -1)
    routing = gather(method, replace(given, position_ids=places, training=True))[2]
    assert routing is not None
    chosen = torch.zeros(2, 20, SHAPE.num_heads).view(40, -1)
    chosen[routing.token_ids, routing.expert_ids] = 1
    assert (chosen.view(2, 20, -1)[:, :12].sum(1) == 3).all()
    assert (chosen.view(2, 20, -1)[:, 12:].sum(1) == 2).all()


def test_only_keys_of_chosen_tokens_are_kept() -> None:
    method, cache = SparseHeads(SHAPE, sparsity=8, seed=2), DynamicCache(config=config())
    long = text(5, places=400)
    gather(method, Text(x=long.x), cache, past=0)
    kept = recall(cache, "attention.0")
    assert kept["held"].sum(-1).float().mean() < 400 / 8 * 1.5
    assert kept["keys"].shape[2] == int(kept["held"].sum(-1).max())
    assert cache.get_seq_length() == 400
    assert cache.layers[0].keys.numel() == 2 * 400  # one number a token, for the length


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingError, match=r"num_dense of SparseHeads must be in \[0, 3\]"):
        SparseHeads(SHAPE, num_dense=4)
    with pytest.raises(SettingError, match="set query_key_norm to head or none"):
        SparseHeads(SHAPE, query_key_norm="full")
