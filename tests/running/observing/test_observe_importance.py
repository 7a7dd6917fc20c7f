"""What every matrix is given: squares as a plain loop takes them, and stopped work that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.data.tokens import TokenBatch
from mixtura.fitting.journal import Journal
from mixtura.fitting.outputs import KeptOutputs
from mixtura.running.observing.importance import Inputs, inputs_of
from mixtura.running.stream import Streamed

IDS = torch.arange(36).view(3, 12) % 40 + 5
MASK = torch.ones_like(IDS)
MASK[1, 9:] = 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("importance") / "tiny")


def batch() -> TokenBatch:
    return TokenBatch(IDS, MASK, torch.zeros(3, dtype=torch.int64), ("text",))


def found(source: Path, kept: KeptOutputs | None = None, stop_after: int | None = None) -> Inputs:
    def report(done: int, total: int) -> None:
        assert total == len(open_checkpoint(source).layers)
        if done == stop_after:
            raise KeyboardInterrupt

    return inputs_of(Streamed(open_checkpoint(source)), batch(), report, kept)


@torch.no_grad()
def by_a_loop(source: Path) -> dict[str, tuple[Tensor, int]]:
    """Sequence by sequence through plain transformers; experts by what their router chose."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    sums: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, row: Tensor) -> None:
        held, count = sums.get(name, (torch.zeros_like(row), 0))
        sums[name] = (held + row.square(), count + 1)

    def linear(name: str, length: int) -> object:
        def see(_: object, inputs: tuple[Tensor, ...]) -> None:
            for row in inputs[0].flatten(0, -2)[:length]:
                add(name, row)

        return see

    def experts(name: str, module: torch.nn.Module) -> object:
        def see(_: object, inputs: tuple[Tensor, ...]) -> None:
            for row, chosen in zip(inputs[0].flatten(0, -2), inputs[1], strict=True):
                for expert in chosen.tolist():
                    gate, up = (module.gate_up_proj[expert] @ row).chunk(2)
                    add(f"{name}.{expert}.up", row)
                    add(f"{name}.{expert}.down", torch.nn.functional.silu(gate) * up)

        return see

    for ids, mask in zip(IDS, MASK, strict=True):
        length, handles = int(mask.sum()), []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_pre_hook(linear(name, length)))
            elif name.endswith(".experts"):
                handles.append(module.register_forward_pre_hook(experts(name, module)))
        model(input_ids=ids[None, :length], use_cache=False)
        for handle in handles:
            handle.remove()
    return sums


def test_squares_are_those_of_a_loop(source: Path) -> None:
    inputs, wanted = found(source), by_a_loop(source)
    assert {name for name, rows in inputs.rows.items() if rows} == set(wanted)
    for name, (squares, count) in wanted.items():
        assert inputs.rows[name] == count
        torch.testing.assert_close(inputs.squares[name], squares / count, rtol=1e-4, atol=1e-6)


def test_stopped_work_goes_on_to_the_same_numbers(source: Path, tmp_path: Path) -> None:
    whole, kept = found(source), KeptOutputs(Journal(tmp_path), "inputs")
    with pytest.raises(KeyboardInterrupt):
        found(source, kept, stop_after=1)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs-0-0.safetensors"]
    # What is there is believed: the first layer's experts are not run again.
    held = kept.read(0, 0)
    assert held is not None
    again = found(source, kept)
    same(again.squares, whole.squares)
    assert again.rows == whole.rows
    changed = {name: value + 1 if name.startswith("squares:") else value for name, value in held.items()}
    kept.keep(0, 0, changed)
    off = found(source, kept)
    layer = open_checkpoint(source).layers[0].name
    expert = next(e for e in range(8) if off.rows[f"{layer}.{e}.up"])
    assert not torch.equal(off.squares[f"{layer}.{expert}.up"], whole.squares[f"{layer}.{expert}.up"])
    kept.forget()
    assert not list(tmp_path.iterdir())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
