"""compressed-tensors checkpoints: plain transformers computes what was measured; the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_class
from safetensors import safe_open
from tiny_checkpoints import run_mixtura, save_tiny, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mixtura import compress, export_compressed_tensors, load
from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.data.tasks import sample
from mixtura.errors import UserError
from mixtura.types import Drop, Merge, Plan, Quantize

pytest.importorskip("compressed_tensors", reason="it is in mixtura[compressed-tensors]")

IDS = torch.arange(48).view(3, 16) + 5
GROUP = {"quantize": {"group_size": 16}}
FAMILIES = [
    "qwen3_moe",
    "deepseek_v3",
    *(
        pytest.param(family, marks=pytest.mark.slow)
        for family in (
            "mixtral",
            "olmoe",
            "qwen2_moe",
            "glm4_moe",
            "nemotron_h",
            "jamba",
            "qwen3_5_moe",
            "minimax",
        )
    ),
]
REFUSED = [
    ("gpt_oss", "have biases or lie transposed"),
    ("granitemoehybrid", "keep all experts of a layer in one tensor"),
    ("kimi_linear", "its reader of compressed-tensors loses"),
]


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits = model(input_ids=IDS).logits
    assert isinstance(logits, Tensor)
    return logits


def same_experts(one: Any, other: Any) -> Tensor:
    """Which tokens go to the same experts in all layers of both models."""
    chosen: list[list[Tensor]] = [[], []]
    for model, seen in zip((one, other), chosen, strict=True):
        for module in model.modules():
            if type(module).__name__.endswith("Experts"):
                module.register_forward_pre_hook(
                    lambda _, given, to=seen: to.append(given[1].sort(-1).values)
                )
        logits_of(model)
    same = [(a == b).all(-1) for a, b in zip(*chosen, strict=True)]
    assert same
    return torch.stack(same).all(0).view(IDS.shape)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("pack") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack_text") / "text.txt"
    path.write_text("\n".join(task.prompt + task.completion for task in sample("training", 6)))
    return path


def rounded(
    source: Path, out: Path, by_layer: dict[int, dict[str, Any]], quantizer: str = "integers"
) -> Path:
    """All experts rounded without calibration, layer by layer as it says."""
    actions = [
        Quantize(layer.index, expert, quantizer, by_layer.get(layer.index, by_layer[-1]))
        for layer in open_checkpoint(source).layers
        for expert in range(layer.num_experts)
    ]
    return apply_plan(Plan(checkpoint_digest(source), tuple(actions)), source, out, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_computes_the_same(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path / "whole", family)
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    model = model_class(family).from_pretrained(tmp_path / "whole", config=config, dtype=dtype)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    packed = rounded(tmp_path / "source", tmp_path / "packed", {-1: {"bits": 3, "group_size": 0}})
    made = export_compressed_tensors(packed, tmp_path / "out")
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert {parameter.dtype for parameter in read.parameters()} <= {dtype, torch.float32}
    for layer in open_checkpoint(packed).layers:
        experts = read.get_submodule(layer.name)
        for expert in range(layer.num_experts):
            own = layer.native_expert(expert)
            for name, wanted in zip(layer.layout.parameters, (own.up, own.down), strict=True):
                assert torch.equal(getattr(experts, name)[expert], wanted.to(dtype))
    # In bfloat16 sums of another order may choose another expert.
    if dtype == torch.float32:
        torch.testing.assert_close(logits_of(read), logits_of(load(packed)), rtol=1e-4, atol=1e-5)
    total = 0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        total = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert made.bytes_after == total
    assert made.quality is None


def test_compress_drops_rounds_and_measures_what_transformers_reads(
    source: Path, text: Path, tmp_path: Path
) -> None:
    made = compress(
        source, tmp_path / "out", prune="reap", keep=0.5, quantize="integers", bits=4, settings=GROUP,
        text=text, tokens=256, length=64, to_format="compressed-tensors",
    )  # fmt: skip
    assert made.ordinary
    assert f"vllm serve {made.out}" in made.commands
    assert AutoConfig.from_pretrained(made.out).num_experts == 4
    beside = compress(
        source, tmp_path / "ours", prune="reap", keep=0.5, quantize="integers", bits=4, settings=GROUP,
        text=text, tokens=256, length=64,
    )  # fmt: skip
    assert made.quality is not None
    assert beside.quality is not None
    assert made.quality.kl == beside.quality.kl
    read = AutoModelForCausalLM.from_pretrained(made.out)
    torch.testing.assert_close(logits_of(read), logits_of(load(beside.out)), rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("*.work"))


def test_what_is_not_so_is_rounded_on_request_and_measured(source: Path, text: Path, tmp_path: Path) -> None:
    packed = rounded(source, tmp_path / "trellis", {-1: {"bits": 4}}, "trellis")
    with pytest.raises(UserError, match=r"expert 0 of layer 0 is stored by trellis \(bits=4.*give --bits"):
        export_compressed_tensors(packed, tmp_path / "out")
    made = export_compressed_tensors(packed, tmp_path / "out", bits=8, group_size=16, text=text, tokens=256)
    assert made.quality is not None
    assert 0 < made.quality.kl < 0.01
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    alike = same_experts(read, load(packed))
    off = (logits_of(read) - logits_of(load(packed))).abs()
    # A token whose experts nearly tied goes to others, and its logits are off by more.
    assert alike.float().mean() > 0.9
    assert 0 < off[alike].max() < 0.05
    assert off.mean() < 0.005
    assert str(made.quality.num_tokens) in (tmp_path / "out" / "README.md").read_text().replace(",", "")
    again = export_compressed_tensors(
        packed, tmp_path / "again", bits=8, group_size=16, text=text, tokens=256, measure=False
    )
    assert again.quality is None
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize(("family", "said"), REFUSED)
def test_families_that_the_format_cannot_say(family: str, said: str, text: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    with pytest.raises(UserError, match=said):
        compress(
            source, tmp_path / "out", quantize="integers", bits=4, settings={"quantize": {"group_size": 0}},
            to_format="compressed-tensors", text=text,
        )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_models_that_the_format_cannot_say(source: Path, tmp_path: Path) -> None:
    ways = {0: {"bits": 4, "group_size": 16}, -1: {"bits": 8, "group_size": 16}}
    mixed = rounded(source, tmp_path / "mixed", ways)
    with pytest.raises(UserError, match=r"several ways.*4 bits in groups of 16 in layers 0.*8 bits"):
        export_compressed_tensors(mixed, tmp_path / "out")
    digest = checkpoint_digest(source)
    uneven = apply_plan(Plan(digest, (Drop(0, (1,)),)), source, tmp_path / "uneven", progress=False)
    with pytest.raises(UserError, match=r"different numbers of experts \(7, 8\)"):
        export_compressed_tensors(uneven, tmp_path / "out", bits=4, group_size=16)
    merge = Merge(0, (1, 2), (0.5, 0.5))
    merged = apply_plan(Plan(digest, (merge,)), source, tmp_path / "merged", progress=False)
    with pytest.raises(UserError, match="experts of layer 0 were merged"):
        export_compressed_tensors(merged, tmp_path / "out", bits=4, group_size=16)
    with pytest.raises(UserError, match="layer 0 are stored whole"):
        export_compressed_tensors(source, tmp_path / "out")
    with pytest.raises(UserError, match="groups of 128 weights do not divide rows of 16 and 32"):
        export_compressed_tensors(source, tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()


def test_the_command(source: Path, text: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "out", ["export", str(source), "--format", "compressed-tensors"]
    rounding = ["--bits", "4", "--group-size", "16", "--text", str(text)]
    done = run_mixtura(*given, *rounding, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "experts in 4 bits" in done.stdout
    assert "KL to what it was made from" in done.stdout
    for bad, said in (
        (["--type", "q4_k"], "for GGUF files"),
        (["--bits", "9"], "must be 2 to 8"),
        (["--bits", "4"], "do not divide rows"),
        ([], "give --bits"),
    ):
        refused = run_mixtura(*given, *bad, "--out", str(tmp_path / "no"))
        assert refused.returncode == 2, refused.stderr
        assert said in " ".join(refused.stderr.split())
    gguf = run_mixtura("export", str(source), "--bits", "4", "--out", str(tmp_path / "no.gguf"))
    assert gguf.returncode == 2
    again = run_mixtura(*given, *rounding, "--out", str(out))
    assert again.returncode == 2
    assert "never overwritten" in " ".join(again.stderr.split())
