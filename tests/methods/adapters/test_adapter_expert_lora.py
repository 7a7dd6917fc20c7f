"""What the adapter expert_lora promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.adapters.adapter_sites import experts_site, linear_site

from mixtura.authoring.contracts import sample_trace
from mixtura.errors import SettingError, UserError
from mixtura.methods.adapters.expert_lora import ExpertLora
from mixtura.types import LowRank, RouterInput, Site


def factors(made: ExpertLora, name: str) -> LowRank:
    """The factors of one of its matrices."""
    part = made.change(RouterInput.of(torch.zeros(0, 16))).matrices[name]
    assert isinstance(part, LowRank)
    return part


def test_scale_is_alpha_over_each_experts_own_rank() -> None:
    made = ExpertLora(experts_site(1), rank=2, alpha=8.0, ranks={"3": 4, "1.0": 1, "2.0": 3})
    assert made.ranks_here == [1, 2, 2, 4]
    part = factors(made, "up")
    assert part.scale.tolist() == [8.0, 4.0, 4.0, 2.0]
    # What lies beyond an expert's rank is zero on both sides, which no gradient leaves.
    for expert, rank in enumerate(made.ranks_here):
        assert part.a[expert, rank:].abs().sum() == 0
        assert (part.a[expert, :rank].abs().sum(1) > 0).all()
    (part.b @ part.a).square().sum().backward()
    assert made.up_a.grad.abs().sum() == 0


def test_ranks_stay_what_they_are_in_training() -> None:
    made = ExpertLora(experts_site(), rank=3, ranks={"0": 1})
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1)
    target = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        part = factors(made, "up")
        ((part.b @ part.a) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert made.up_a[0, 1:].abs().sum() == made.up_b[0, :, 1:].abs().sum() == 0
    assert made.up_b[1].abs().min() > 0


def test_no_two_sites_experts_or_matrices_begin_alike() -> None:
    one, other = ExpertLora(experts_site(0)), ExpertLora(experts_site(1))
    drawn = [one.up_a[0], one.up_a[1], one.down_a[0][:, :12], other.up_a[0]]
    assert all(not torch.equal(a[:, :12], b[:, :12]) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(one.up_a, ExpertLora(experts_site(0)).up_a)
    assert one.up_a.abs().max() <= 16**-0.5


@pytest.mark.parametrize(
    ("experts", "layer", "expected"),
    [(None, 0, (0, 1, 2, 3)), ([2, 0], 1, (0, 2)), ({"1": [3]}, 1, (3,)), ({"1": [3]}, 0, ())],
)
def test_experts_are_named_for_all_layers_or_by_layer(
    experts: Any, layer: int, expected: tuple[int, ...]
) -> None:
    assert ExpertLora(experts_site(layer), experts=experts).expert_ids == expected


@pytest.mark.parametrize("matrices", [["up"], ["down"], None])
def test_only_named_matrices_are_changed(matrices: Any) -> None:
    made = ExpertLora(experts_site(), matrices=matrices)
    changed = made.change(RouterInput.of(torch.zeros(0, 16))).matrices
    assert list(changed) == (matrices or ["up", "down"])
    assert len(list(made.parameters())) == 2 * len(changed)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 13}, r"rank of ExpertLora must be in \[1, 12\], got 13"),
        ({"ranks": {"0": 13}}, "ranks of ExpertLora must be in"),
        ({"ranks": {"first": 2}}, "write EXPERT or LAYER.EXPERT"),
        ({"experts": [4]}, "name 4 in layer 2, which has experts 0 to 3"),
        ({"experts": [1, 1]}, "twice"),
    ],
)
def test_what_is_out_of_range_is_named(settings: Any, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        ExpertLora(experts_site(2), **settings)


def test_a_linear_layer_is_refused_by_name() -> None:
    site: Site = linear_site()
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj is a linear layer"):
        ExpertLora(site)


def test_a_text_chooses_experts_only_when_asked() -> None:
    trace = sample_trace(num_experts=4)
    assert ExpertLora.settings_from(trace, {}) == {}
    chosen = ExpertLora.settings_from(trace, {"score": "gate", "top_p": 0.5})["experts"]
    for layer in trace.layers:
        shares = layer.weight_sums.sum(0) / layer.weight_sums.sum()
        order = shares.argsort(descending=True).tolist()
        count = next(n for n in range(5) if float(shares[order[:n]].sum()) >= 0.5)
        assert chosen[str(layer.index)] == sorted(order[:count])
    assert ExpertLora.settings_from(trace, {"score": "gate", "experts": [1]}) == {}
