"""Latent experts of trained models: nothing lost at full width, the least error at less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.tiny_models import some_ids, tiny_model
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

from mixtura.cli import build_app
from mixtura.data import specimen
from mixtura.errors import SettingError, UnsupportedModelError
from mixtura.modeling.factoring import common_space, factored
from mixtura.modeling.importing import imported
from mixtura.modeling.parts import bank_of

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, intermediate_size=16, num_local_experts=4, sliding_window=3)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, intermediate_size=24, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
            mlp_only_layers=[1], head_dim=16, norm_topk_prob=False, tie_word_embeddings=True,
        )
    ),
    "olmoe": lambda: OlmoeForCausalLM(
        OlmoeConfig(**SIZES, intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(FAMILIES))
def ordinary(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


def test_a_model_of_a_family_is_the_same_as_one_of_our_own(ordinary: Any) -> None:
    ids = some_ids()
    own = imported(ordinary)
    torch.testing.assert_close(own(ids).logits, ordinary(ids).logits, rtol=1e-4, atol=1e-5)
    block = next(layer.mlp for layer in own.model.layers if hasattr(layer.mlp, "experts"))
    assert (
        bank_of(block).gate_up_proj.data_ptr() == ordinary.model.layers[0].mlp.experts.gate_up_proj.data_ptr()
    )


def test_at_the_models_width_nothing_is_lost(ordinary: Any) -> None:
    made = factored(imported(ordinary), width=32, num_groups=2)
    assert max(made.lost) < 1e-6
    torch.testing.assert_close(
        made.model(some_ids()).logits, ordinary(some_ids()).logits, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_less_width_leaves_the_tail_of_the_singular_values(num_groups: int) -> None:
    source = tiny_model()
    made = factored(source, width=5, num_groups=num_groups)
    for block, latent, lost in zip(source.model.blocks, made.model.model.blocks, made.lost, strict=True):
        given, found = bank_of(block), bank_of(latent).matrices()
        tail = 0.0
        for group in given.gate_up_proj.detach().double().chunk(num_groups):
            for half in group.chunk(2, dim=1):
                tail += float(torch.linalg.svdvals(half.reshape(-1, 32))[5:].square().sum())
        error = float((given.gate_up_proj - found.gate_up).double().square().sum())
        assert error == pytest.approx(tail, rel=1e-4)
        assert lost == pytest.approx(
            (tail / float(given.gate_up_proj.double().square().sum())) ** 0.5, rel=1e-4
        )
        assert torch.equal(found.down, given.down_proj)
        held = sum(one.numel() for one in bank_of(latent).parameters())
        assert held == 2 * (4 * 16 * 5 + num_groups * 5 * 32) + 4 * 16 * 32


def test_no_other_space_loses_less() -> None:
    stack = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).double()
    best = common_space(stack, 3)
    torch.testing.assert_close(best @ best.T, torch.eye(3, dtype=torch.float64))
    kept = (stack @ best.T).square().sum()
    for seed in range(5):
        drawn = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)).double()
        other = torch.linalg.qr(drawn).Q.T
        assert (stack @ other.T).square().sum() < kept


def test_what_cannot_be_factored_is_refused() -> None:
    with pytest.raises(SettingError, match=r"width must be in \[1, 32\], the model's, got 33"):
        factored(tiny_model(), width=33)
    with pytest.raises(SettingError, match="num_groups must divide the 4 experts, got 3"):
        factored(tiny_model(), width=3, num_groups=3)
    with pytest.raises(UnsupportedModelError, match="gated experts of silu without biases"):
        factored(tiny_model({"experts": "ternary"}), width=3)
    with pytest.raises(UnsupportedModelError, match="without a form or a common pool"):
        factored(tiny_model({"form": "chain"}), width=3)
    config = OlmoeConfig(**SIZES, intermediate_size=16, num_experts=4, clip_qkv=3.0)
    with pytest.raises(UnsupportedModelError, match="clip_qkv cannot become one of our own"):
        imported(OlmoeForCausalLM(config))


def test_the_command_writes_a_model_that_is_measured_and_loads(tmp_path: Path) -> None:
    small = ["--width", "192", "--groups", "2", "--tokens", "200"]
    arguments = ["factor", str(specimen.path()), *small, "--out", str(tmp_path / "made"), "--json"]
    done = CliRunner().invoke(build_app(), arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["num_bytes"] < found["num_bytes_before"]
    assert 0 < found["kl"] < 5
    assert len(found["lost"]) == 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto")
    assert model.config.moe["experts"] == {"name": "latent", "width": 192, "num_groups": 2}
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
    again = CliRunner().invoke(build_app(), arguments)
    assert "exists and is not empty" in str(again.exception)
