"""What `mixtura.compress` makes: drops as masks, rounding as the compressed layers before ask for, sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import run_mixtura, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixtura import compress, create, load, specimen
from mixtura.checkpoints.contents import read_experts_file
from mixtura.checkpoints.matrices import packable_matrices, rounded
from mixtura.checkpoints.packed import read_expert
from mixtura.checkpoints.skeleton import build, open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.checkpoints.view import masked
from mixtura.data.tokens import num_embeddings_of
from mixtura.errors import UnsupportedModelError
from mixtura.fitting.compressing import Compressed
from mixtura.fitting.quality import ALL
from mixtura.fitting.texts import as_batch, load_texts
from mixtura.running.observing import observe
from mixtura.types import Budget, Plan

IDS = torch.arange(48).view(3, 16) + 5
FAMILIES = [
    "qwen3_moe",
    pytest.param("mixtral", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", marks=pytest.mark.slow),
    pytest.param("gpt_oss", marks=pytest.mark.slow),
    pytest.param("glm4_moe", marks=pytest.mark.slow),
    pytest.param("granitemoehybrid", marks=pytest.mark.slow),
]


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits = model(input_ids=IDS).logits
    assert isinstance(logits, Tensor)
    return logits


def bytes_of(folder: Path) -> int:
    """Bytes of all tensors in a folder, by their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_is_masking(family: str, text: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    made = compress(source, tmp_path / "out", prune="reap", keep=0.5, text=text, tokens=256, length=64)
    assert made.ordinary
    assert made.bytes_after == bytes_of(made.out)
    assert made.bytes_before == bytes_of(source)
    assert {len(gone) for gone in made.dropped.values()} == {4}
    whole, cut = load(source, dtype=torch.float32), AutoModelForCausalLM.from_pretrained(made.out)
    with masked(whole, made.dropped):
        torch.testing.assert_close(logits_of(cut.float()), logits_of(whole), rtol=1e-4, atol=1e-5)
    assert Compressed.from_dict(json.loads((made.out / "compressed.json").read_text())) == made
    assert f"{made.quality.perplexity[ALL]:.3g}"[:3] in (made.out / "README.md").read_text()


def test_the_plan_is_the_pruners_own_on_the_same_text(source: Path, text: Path, tmp_path: Path) -> None:
    made = compress(
        source, tmp_path / "out", prune="easy_ep", keep=0.5, text=text, tokens=256, length=64, measure=False
    )
    view = open_checkpoint(source)
    texts = load_texts(
        text, load_tokenizer(source), length=64, calibration_tokens=256, held_out_tokens=1, seed=0,
        num_embeddings=num_embeddings_of(view.config),
    )  # fmt: skip
    pruner = create("pruners", "easy_ep")
    statistics = ["output_norm_by_change", "weighted_output_norm", "max_output"]
    trace = observe(source, as_batch(texts.calibration), statistics=statistics, progress=False)
    plan: Plan = pruner.plan(trace, Budget(num_experts=4))
    assert made.dropped == plan.dropped()
    assert made.quality is None
    assert made.num_tokens == sum(trace.num_tokens)


@torch.no_grad()
def test_rounding_sees_what_the_compressed_layers_before_give(
    source: Path, text: Path, tmp_path: Path
) -> None:
    """The codes of the last layer, from moments that a plain loop takes of the written model itself."""
    made = compress(
        source, tmp_path / "out", prune="frequency", keep=0.75, quantize="gptq", bits=4,
        text=text, tokens=256, length=64, measure=False,
    )  # fmt: skip
    assert not made.ordinary
    assert made.bytes_after == bytes_of(made.out)
    view = open_checkpoint(source)
    texts = load_texts(
        text, load_tokenizer(source), length=64, calibration_tokens=256, held_out_tokens=1, seed=0,
        num_embeddings=num_embeddings_of(view.config),
    )  # fmt: skip
    model, last = load(made.out), view.layers[-1]
    given: list[tuple[Tensor, ...]] = []
    handle = model.get_submodule(last.name).register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    tokens = as_batch(texts.calibration)
    for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True):
        model(input_ids=ids[mask.bool()][None], use_cache=False)
    handle.remove()
    hidden, index, weights = (torch.cat([one[i].float() for one in given]) for i in range(3))
    record = next(one for one in read_experts_file(made.out).layers if one.name == last.name)
    quantizer = create("quantizers", "gptq", bits=4)
    written = open_checkpoint(made.out)
    average = hidden.T @ hidden * (weights.square().mean() / len(hidden))
    alike = []
    for place, expert in enumerate(record.kept):
        moments = 64 * average
        for row, chosen, weight in zip(hidden, index, weights, strict=True):
            for number, own in zip(chosen.tolist(), weight.tolist(), strict=True):
                if number == place:
                    moments = moments + own * own * torch.outer(row, row)
        encoded = quantizer.encode(last.native_expert(expert).up.contiguous(), moments)
        stored = read_expert(record, place, written.tensor).up.dense(torch.float32)
        alike.append((quantizer.decode(encoded) == stored).float().mean())
    assert torch.stack(alike).mean() > 0.97


def test_measured_loss_is_that_of_the_written_model(source: Path, text: Path, tmp_path: Path) -> None:
    made = compress(
        source, tmp_path / "out", quantize="round_to_nearest", bits=2, text=text, tokens=256, length=64
    )
    assert made.quality is not None
    assert made.quality_before is not None
    texts = load_texts(
        text, load_tokenizer(source), length=64, calibration_tokens=256, held_out_tokens=8192, seed=0
    )
    before, after = load(source), load(made.out)
    total, count = 0.0, 0
    for part in texts.held_out:
        for ids, mask in zip(part.input_ids, part.attention_mask, strict=True):
            own = ids[mask.bool()][None]
            with torch.no_grad():
                one, other = (model(input_ids=own).logits[0, :-1].float() for model in (before, after))
            p, q = one.log_softmax(-1), other.log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
            count += len(p)
    assert made.quality.kl == pytest.approx(total / count, rel=1e-3)
    assert made.quality_before.kl == pytest.approx(0, abs=1e-6)
    assert {one.num_experts for one in made.rounding} == {8}
    assert all(0 < one.error < 1 for one in made.rounding)


@pytest.mark.parametrize("merge", ["m_smoe", "hc_smoe", "average"])
def test_merging_is_applying_the_mergers_plan(merge: str, source: Path, text: Path, tmp_path: Path) -> None:
    made = compress(source, tmp_path / "out", merge=merge, keep=0.5, text=text, tokens=256, length=64)
    assert made.bytes_after == bytes_of(made.out)
    assert not made.dropped
    for groups in made.merged.values():
        assert 8 - sum(len(group) - 1 for group in groups) == 4
    # Every expert may still be chosen, and half of their bytes are gone.
    assert all(layer.num_experts == 8 for layer in open_checkpoint(made.out).layers)
    experts = sum(8 * layer.expert_num_bytes for layer in open_checkpoint(source).layers)
    assert made.bytes_before - made.bytes_after == experts // 2
    assert made.quality is not None
    assert 0 < made.quality.kl < 5


def test_merged_experts_are_rounded_by_the_tokens_of_all_members(
    source: Path, text: Path, tmp_path: Path
) -> None:
    made = compress(
        source, tmp_path / "out", merge="m_smoe", keep=0.5, quantize="round_to_nearest", bits=8,
        text=text, tokens=256, length=64,
    )  # fmt: skip
    alone = compress(source, tmp_path / "merged", merge="m_smoe", keep=0.5, text=text, tokens=256, length=64)
    assert made.merged == alone.merged
    assert made.quality is not None
    assert alone.quality is not None
    assert made.quality.kl == pytest.approx(alone.quality.kl, rel=0.2)
    assert {one.num_experts for one in made.rounding} == {4}
    for one in made.rounding:
        assert one.error < 1e-3


def test_what_is_outside_the_experts_is_rounded_where_that_is_asked_for(
    source: Path, text: Path, tmp_path: Path
) -> None:
    made = compress(source, tmp_path / "out", rest_bits=8, text=text, tokens=256, length=64)
    assert made.bytes_after == bytes_of(made.out) < made.bytes_before
    both = compress(
        source, tmp_path / "both", prune="reap", keep=0.5, quantize="gptq", bits=8, rest_bits=4,
        text=text, tokens=256, length=64, measure=False,
    )  # fmt: skip
    assert both.bytes_after < made.bytes_after
    assert both.untouched == made.untouched < made.bytes_before
    assert any("4 bits without calibration" in note for note in both.notes)
    plain = load(source, dtype=torch.float32)
    for name, matrix in packable_matrices(build(open_checkpoint(source)), open_checkpoint(source)).items():
        weight = plain.get_parameter(name)
        assert tuple(weight.shape) == (matrix.rows, matrix.cols)
        with torch.no_grad():
            weight.copy_(rounded(weight, create("quantizers", "round_to_nearest", bits=8)))
    torch.testing.assert_close(
        logits_of(load(made.out, dtype=torch.float32)), logits_of(plain), rtol=1e-4, atol=1e-5
    )


def test_experts_that_few_tokens_reach_are_named(source: Path, text: Path, tmp_path: Path) -> None:
    done = run_mixtura(
        "compress", str(source), "--quantize", "gptq", "--bits", "4", "--text", str(text), "--tokens", "24",
        "--no-measure", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "were reached by fewer than 16" in done.stdout
    assert "mixtura generate" in done.stdout
    made = Compressed.from_dict(json.loads((tmp_path / "out" / "compressed.json").read_text()))
    assert made.seldom
    assert all(number < 16 for few in made.seldom.values() for number in few.values())
    assert not (tmp_path / "out.work").exists()


def test_gguf(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "model.gguf"
    made = compress(
        specimen.path(),
        out,
        prune="reap",
        keep=0.5,
        tokens=256,
        measure=False,
        to_format="gguf",
        types=["q8_0"],
    )
    assert out.read_bytes()[:4] == b"GGUF"
    assert out.stat().st_size < made.bytes_before
    assert str(out) in made.commands[0]
    assert not (tmp_path / "model.gguf.work").exists()
    # A family's setting that llama.cpp computes otherwise is found before the work.
    with pytest.raises(UnsupportedModelError, match="norm_topk_prob"):
        compress(save_tiny(tmp_path / "tiny"), tmp_path / "b.gguf", prune="reap", keep=0.5, to_format="gguf")
    assert not list(tmp_path.glob("b.gguf*"))
