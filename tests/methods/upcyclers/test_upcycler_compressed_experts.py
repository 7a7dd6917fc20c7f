"""What the upcycler compressed_experts promises beyond its kind's contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dense_checkpoints import save_dense
from modeling.tiny_models import some_ids
from tiny_checkpoints import tiny_tokenizer
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

import mixtura
from mixtura.errors import UserError
from mixtura.running.loading import load_own_model


def _moe(path: Path, norm: bool = False) -> Path:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.2, pad_token_id=0, intermediate_size=16,
        num_experts=8, num_experts_per_tok=4, norm_topk_prob=norm,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_at_the_start_it_is_the_model_with_fewer_experts(tmp_path: Path) -> None:
    source = _moe(tmp_path / "moe")
    made = mixtura.upcycle(source, tmp_path / "out", method="compressed_experts", top_k=2)
    assert (made.family, made.num_experts, made.top_k, made.d_expert) == ("mixtura", 8, 2, 16)
    assert made.after is not None
    assert made.beside is not None
    assert made.beside.kl > 0
    # Weights of OLMoE are not divided by their sum, so that fewer of them are simply fewer.
    fewer = AutoModelForCausalLM.from_pretrained(source, num_experts_per_tok=2).eval()
    own = load_own_model(tmp_path / "out")
    torch.testing.assert_close(own(some_ids()).logits, fewer(some_ids()).logits, rtol=1e-4, atol=1e-5)
    router = own.model.blocks[0].router
    assert (router.top_k, router.compressed, router.renormalize) == (2, 2, False)
    assert int(router.vectors.count_nonzero()) == 0
    published = json.loads((tmp_path / "out" / "upcycled.json").read_text())
    assert published["method"] == "compressed_experts"
    assert (tmp_path / "out" / "README.md").is_file()
    assert not (tmp_path / "out.work").exists()


def test_vectors_learn_and_are_saved(tmp_path: Path) -> None:
    source = _moe(tmp_path / "moe", norm=True)
    mixtura.upcycle(source, tmp_path / "out", method="compressed_experts", top_k=2, measure=False)
    own = load_own_model(tmp_path / "out").train()
    ids = some_ids()
    own(ids, labels=ids).loss.backward()
    for block in own.model.blocks:
        assert float(block.router.vectors.grad.abs().sum()) > 0
        with torch.no_grad():
            block.router.vectors.sub_(block.router.vectors.grad)
    own.eval().save_pretrained(tmp_path / "trained")
    again = load_own_model(tmp_path / "trained")
    assert torch.equal(again(ids).logits, own(ids).logits)


def test_what_does_not_go_is_refused(tmp_path: Path) -> None:
    source = _moe(tmp_path / "moe")
    out = tmp_path / "out"

    def make(model: Path, **how: object) -> None:
        mixtura.upcycle(model, out, method="compressed_experts", measure=False, **how)

    with pytest.raises(UserError, match="a token has 4 experts in this model, and 4 are to stay"):
        make(source, top_k=4)
    with pytest.raises(UserError, match="leave --experts and --target out"):
        make(source, experts=8)
    with pytest.raises(UserError):
        make(save_dense(tmp_path / "dense"))
    assert not out.exists()
