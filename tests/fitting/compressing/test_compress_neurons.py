"""Neurons taken out of experts: a mask, an ordinary checkpoint, and scores as plain autograd gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import run_mixtura, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixtura import UserError, compress
from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.fitting.compressing.neurons import NeuronSums, _backwards, _streamed
from mixtura.fitting.compressing.reading import read_texts
from mixtura.fitting.texts import as_batch
from mixtura.running.observing.passing import packed
from mixtura.types import Drop, Plan, Trim

IDS = torch.arange(48).view(3, 16) + 5
FAMILIES = [
    "qwen3_moe",
    *(
        pytest.param(family, marks=pytest.mark.slow)
        for family in ("mixtral", "olmoe", "qwen2_moe", "minimax")
    ),
]


class Progress:
    def advance(self) -> None:
        pass


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits = model(input_ids=IDS).logits
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_taking_neurons_out_is_masking_them(family: str, text: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    method = {"neurons": "contribution", "keep_neurons": 0.5}
    made = compress(source, tmp_path / "out", **method, text=text, tokens=256, length=64)
    assert made.ordinary
    view = open_checkpoint(source)
    width = view.layers[0].shape.d_expert
    # A multiple of 8, as the whole is.
    kept = width // 2 // 8 * 8
    assert made.width == (width, kept)
    assert made.bytes_after < made.bytes_before
    plan = Plan.from_json((made.out / "plan.json").read_text())
    masked = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for (layer, expert), neurons in plan.trimmed().items():
            experts = masked.get_submodule(view.layer(layer).name)
            experts.down_proj[expert][:, list(neurons)] = 0.0
    cut, info = AutoModelForCausalLM.from_pretrained(made.out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits_of(cut), logits_of(masked), rtol=1e-4, atol=1e-5)
    assert f"every expert: {width - kept}" in (made.out / "README.md").read_text()


def by_autograd(source: Path, sequences: list[Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Sums of squares of neurons and of the loss's derivatives by their outputs' scale, sequence by sequence.

    A neuron's output is multiplied by a factor 1 for each token and expert; the derivative by the factor,
    divided by the activation, is the gradient by the expert's output times the neuron's column.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).requires_grad_(False)
    view = open_checkpoint(source)
    squares = {layer.index: torch.zeros(layer.num_experts, layer.shape.d_expert) for layer in view.layers}
    pulls = {index: torch.zeros_like(one) for index, one in squares.items()}
    leaves: list[tuple[int, int, Tensor]] = []

    def forward_of(index: int, experts: Any) -> Any:
        def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            outputs = []
            for row, own, shares in zip(hidden, chosen, weights, strict=True):
                total = torch.zeros_like(row)
                for expert, share in zip(own.tolist(), shares, strict=True):
                    gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
                    neurons = torch.nn.functional.silu(gate) * up
                    squares[index][expert] += neurons.detach().square()
                    shift = torch.zeros_like(neurons, requires_grad=True)
                    leaves.append((index, expert, shift))
                    total = total + share * (experts.down_proj[expert] @ (neurons + shift))
                outputs.append(total)
            return torch.stack(outputs)

        return forward

    for layer in view.layers:
        experts = model.get_submodule(layer.name)
        experts.forward = forward_of(layer.index, experts)
    for ids in sequences:
        leaves.clear()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
        for index, expert, shift in leaves:
            assert shift.grad is not None
            pulls[index][expert] += shift.grad.square()
    return squares, pulls


def test_sums_are_those_of_plain_autograd(source: Path, text: Path) -> None:
    view = open_checkpoint(source)
    tokens = packed(as_batch(read_texts(view, text, tokens=100, seed=0, length=40).calibration))
    sequences = [ids[mask.bool()] for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)]
    squares, pulls = by_autograd(source, sequences)
    with_gradients = _backwards(view, tokens, lambda _: Progress())
    without = _streamed(view, tokens, lambda _: Progress())
    for one, other in zip(with_gradients, without, strict=True):
        index = one.layer.index
        torch.testing.assert_close(one.squares, squares[index], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(other.squares, squares[index], rtol=1e-3, atol=1e-5)
        assert one.pulls is not None
        torch.testing.assert_close(one.pulls, pulls[index], rtol=1e-3, atol=1e-8)
        assert torch.equal(one.rows, other.rows)
        assert other.pulls is None
        assert isinstance(one, NeuronSums)


def test_heapr_from_the_command_line_and_again(source: Path, text: Path, tmp_path: Path) -> None:
    given = ["compress", str(source), "--neurons", "heapr", "--keep-neurons", "0.5", "--text", str(text)]
    given += ["--tokens", "256", "--length", "64"]
    done = run_mixtura(*given, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "8 of 16 neurons stay in every expert" in done.stdout
    made = json.loads((tmp_path / "out" / "compressed.json").read_text())
    assert made["width"] == [16, 8]
    again = run_mixtura(*given, "--out", str(tmp_path / "again"), "--no-measure")
    assert again.returncode == 0, again.stderr
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"neurons": "heapr"}, "--neurons needs --keep-neurons"),
        ({"neurons": "heapr", "keep_neurons": 1.0}, "above 0 and below 1, got 1.0"),
        ({"keep_neurons": 0.5}, "give --neurons METHOD as well"),
        ({"neurons": "heap", "keep_neurons": 0.5}, "did you mean 'heapr'"),
        (
            {"neurons": "heapr", "keep_neurons": 0.1},
            "leaves none of an expert's 16 neurons",
        ),
        (
            {"neurons": "heapr", "keep_neurons": 0.5, "quantize": "gptq"},
            "goes alone, and --quantize",
        ),
    ],
)
def test_what_is_refused(
    choices: dict[str, Any], said: str, source: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        compress(source, tmp_path / "out", text=text, **choices)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("deepseek_v3", "width of its routed experts and of nothing else"),
        ("gpt_oss", "lie transposed or have biases"),
        ("granitemoehybrid", "all experts of a layer in one tensor"),
    ],
)
def test_families_of_which_neurons_are_not_taken(family: str, said: str, text: Path, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    with pytest.raises(UserError, match=said):
        compress(source, tmp_path / "out", neurons="contribution", keep_neurons=0.5, text=text)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_plans_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    digest = checkpoint_digest(source)
    trims = tuple(Trim(layer.index, e, (0, 1)) for layer in open_checkpoint(source).layers for e in range(8))
    for actions, said in (
        (trims[:-1], "leaves experts of 14, 16 neurons"),
        ((*trims[:-1], Trim(trims[-1].layer, 7, (0, 16))), "not there: it has 0 to 15"),
        ((*trims, Drop(0, (1,))), r"something else besides \(drop\)"),
    ):
        with pytest.raises(UserError, match=said):
            apply_plan(Plan(digest, actions), source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
