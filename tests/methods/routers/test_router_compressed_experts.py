"""What the router compressed_experts promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import mixtura
from mixtura.errors import UserError
from mixtura.methods.routers.compressed_experts import CompressedExperts
from mixtura.methods.routers.top_k import TopK
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=5)


def _tokens(count: int = 7) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(1))


def _with_vectors(**settings: int | bool) -> CompressedExperts:
    router = CompressedExperts(SHAPE, **settings)
    with torch.no_grad():
        router.vectors.normal_(generator=torch.Generator().manual_seed(2))
    return router


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_layer_equals_the_formula_token_by_token(renormalize: bool) -> None:
    router, experts = _with_vectors(top_k=2, compressed=2, renormalize=renormalize), Experts(SHAPE)
    x = _tokens()
    found, routing = MoELayer(router, experts)(RouterInput.of(x))
    for token, own in enumerate(x):
        shares = (router.weight @ own).softmax(-1)
        order = sorted(range(5), key=lambda e: -float(shares[e]))[:4]
        weights = {e: shares[e] / (sum(shares[o] for o in order) if renormalize else 1.0) for e in order}
        read = own * (1 + sum(weights[a] * router.vectors[a] for a in order[2:]))
        wanted = torch.zeros(SHAPE.d_model)
        for e in order[:2]:
            gate, up = (experts.gate_up_proj[e] @ read).chunk(2)
            wanted = wanted + weights[e] * (experts.down_proj[e] @ (F.silu(gate) * up))
        torch.testing.assert_close(found[token], wanted)
    assert int(routing.load.sum()) == 2 * len(x)


def test_with_vectors_of_zeros_it_is_the_trained_router_without_the_last_experts() -> None:
    x, experts = _tokens(), Experts(SHAPE)
    router, whole = CompressedExperts(SHAPE, top_k=2, compressed=1), TopK(SHAPE, top_k=3)
    whole.load_state_dict({"weight": router.weight})
    routing = whole(RouterInput.of(x))
    weights = torch.zeros(len(x), 5).index_put((routing.token_ids, routing.expert_ids), routing.weights)
    least = weights.masked_fill(weights == 0, 9.0).argmin(-1)
    weights = weights.scatter(1, least[:, None], 0.0)
    tokens, ids = weights.nonzero(as_tuple=True)
    wanted = experts.matrices.weighted(x, tokens, ids, weights[tokens, ids])
    torch.testing.assert_close(MoELayer(router, experts)(RouterInput.of(x))[0], wanted)


def test_with_nothing_compressed_it_is_top_k() -> None:
    router, plain = _with_vectors(top_k=2, compressed=0), TopK(SHAPE, top_k=2)
    plain.load_state_dict({"weight": router.weight})
    experts, inputs = Experts(SHAPE), RouterInput.of(_tokens())
    assert torch.equal(MoELayer(router, experts)(inputs)[0], MoELayer(plain, experts)(inputs)[0])


def test_models_of_transformers_refuse_it() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(UserError, match="changes what experts read"):
        mixtura.set_router(MixtralForCausalLM(config), "compressed_experts")
