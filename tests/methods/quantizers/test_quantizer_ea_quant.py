"""What the quantizer ea_quant promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError, UserError
from mixtura.methods.quantizers import LayerSeen
from mixtura.methods.quantizers._smoothing import outlier_scales
from mixtura.methods.quantizers.ea_quant import EaQuant
from mixtura.methods.quantizers.round_to_nearest import RoundToNearest

D_MODEL, ROWS = 24, 10


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(num_tokens: int = 40) -> tuple[LayerSeen, dict[int, Tensor]]:
    """Three experts of which no token chose the last; some features are large."""
    hidden = normal(num_tokens, D_MODEL, seed=1)
    hidden[:, 3] *= 30
    index = torch.randint(-1, 2, (num_tokens, 2), generator=torch.Generator().manual_seed(2))
    matrices = {expert: normal(ROWS, D_MODEL, seed=10 + expert) for expert in range(3)}
    return LayerSeen(hidden, index, (0, 1, 2), matrices.__getitem__, normal(3, D_MODEL, seed=5)), matrices


@pytest.mark.parametrize("most", [5, 1000])
def test_the_merged_scale_by_a_loop(most: int) -> None:
    seen, matrices = layer()
    alpha, wanted = 0.6, []
    for feature in range(D_MODEL):
        asked = []
        for expert, matrix in matrices.items():
            own = [t for t in range(len(seen.hidden)) if expert in seen.index[t].tolist()][:most]
            own = own or list(range(len(seen.hidden)))[:most]
            largest = max(abs(float(seen.hidden[t, feature])) for t in own)
            asked.append(largest**alpha / max(abs(float(w)) for w in matrix[:, feature]) ** (1 - alpha))
        router = max(abs(float(w)) for w in seen.router[:, feature])
        asked.append(float(seen.hidden[:, feature].abs().max()) ** alpha / router ** (1 - alpha))
        wanted.append(max(asked))
    expected = torch.tensor(wanted)
    expected = expected / expected.log().mean().exp()
    bound = EaQuant(alpha=alpha, expert_tokens=most).for_layer(seen)
    for matrix in matrices.values():
        found = bound.encode(matrix).tensors["smooth"].float()
        torch.testing.assert_close(found, expected, rtol=0.005, atol=0)


def test_all_experts_are_rounded_as_plain_rounding_does_it_on_scaled_columns() -> None:
    seen, matrices = layer()
    quantizer, plain = EaQuant(bits=2, group_size=8), RoundToNearest(bits=2, group_size=8)
    bound = quantizer.for_layer(seen)
    for matrix in matrices.values():
        encoded = bound.encode(matrix)
        smooth = encoded.tensors["smooth"].float()
        expected = plain.decode(plain.encode(matrix * smooth)) / smooth
        torch.testing.assert_close(quantizer.decode(encoded), expected)


def test_what_large_inputs_meet_is_rounded_more_finely() -> None:
    seen, matrices = layer()
    # Its weights are small, so that scaling them up does not widen the range of the others.
    for matrix in (*matrices.values(), seen.router):
        matrix[:, 3] *= 0.1
    quantizer = EaQuant(bits=4, group_size=24)
    bound = quantizer.for_layer(seen)
    own = seen.hidden[(seen.index == 0).any(-1)]
    moments = own.T @ own
    lost = [
        float(((own @ (quantizer.decode(one) - matrices[0]).T) ** 2).sum())
        for one in (bound.encode(matrices[0], moments), quantizer.encode(matrices[0]))
    ]
    assert lost[0] < 0.5 * lost[1]


def test_smoothing_that_makes_outputs_worse_is_left_out() -> None:
    seen, matrices = layer()
    # This expert's own inputs are large where the layer's are not.
    inputs = normal(50, D_MODEL, seed=9)
    inputs[:, 7] *= 1000
    encoded = EaQuant(bits=4, group_size=24).for_layer(seen).encode(matrices[0], inputs.T @ inputs)
    assert encoded.tensors["smooth"].float().eq(1).all()


def test_features_that_stand_out_by_the_variance_between_two_classes() -> None:
    sizes = 1 + 0.1 * normal(40, seed=3).abs()
    sizes[[4, 9, 20]] = torch.tensor([3.0, 50.0, 60.0])
    scales = outlier_scales(sizes, 0.8, 0.7)
    # Of the candidates 3, 50 and 60 the last two are a class; 3 is the largest of the others.
    assert (scales != 1).nonzero().flatten().tolist() == [9, 20]
    torch.testing.assert_close(scales[[9, 20]], torch.tensor([50 / 3, 60 / 3]) ** 0.7)


@pytest.mark.parametrize("sizes", [torch.ones(16), torch.zeros(16), torch.eye(16)[0]])
def test_nothing_stands_out_of_features_that_are_alike_or_alone(sizes: Tensor) -> None:
    assert outlier_scales(sizes, 0.8, 0.7).eq(1).all()


def test_bad_settings_and_moments() -> None:
    with pytest.raises(SettingError, match="must be 8, 4 or 2, got 3"):
        EaQuant(bits=3)
    with pytest.raises(SettingError, match="alpha"):
        EaQuant(alpha=1.5)
    with pytest.raises(SettingError, match="expert_tokens"):
        EaQuant(expert_tokens=0)
    with pytest.raises(UserError, match="NaN or infinity"):
        EaQuant().encode(torch.ones(2, 2), torch.full((2, 2), torch.nan))
