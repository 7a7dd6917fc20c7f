"""A whole fit to a GGUF file: within the budget, run by llama.cpp as it was judged, resumed to the byte."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gguf_sources import TEXT, save_source
from transformers import AutoTokenizer

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.fitting import Request, fit
from mixtura.fitting.forms.gguf.form import GgufForm
from mixtura.fitting.forms.gguf.units import PALETTE
from mixtura.running.llama import run_llama

pytest.importorskip("gguf", reason="the package gguf is not installed; it is in mixtura[gguf]")
pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed; pip install 'mixtura[llama]' compiles it"
)
pytestmark = pytest.mark.slow
BUDGET = 3 << 20


class Made(NamedTuple):
    source: Path
    out: Path
    request: Request
    told: dict[str, Any]


def request_for(source: Path, out: Path) -> Request:
    return Request(
        model=source,
        out=out,
        name="tiny",
        form="gguf",
        model_memory_bytes=BUDGET,
        context=64,
        calibration_tokens=512,
        held_out_tokens=256,
        # How much is measured follows from a prediction, which is another one on a busy machine.
        time_s=1e6,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("gguf_fit")
    source = save_source(place / "model", "qwen3_moe", torch.bfloat16, hidden_size=256)
    request = request_for(source, place / "small")
    return Made(source, place / "small", request, fit(request).to_dict())


def test_the_file_is_within_the_budget_and_of_the_types_that_are_told(made: Made) -> None:
    from gguf import GGUFReader

    file = made.out / "small.gguf"
    chosen = made.told["rows"][-1]
    assert chosen["weights_bytes"] == file.stat().st_size
    assert made.told["accounted_bytes"] <= BUDGET
    types = {t.name.removesuffix(".weight"): t.tensor_type.name.lower() for t in GGUFReader(file).tensors}
    told = made.told["settings"]["types"]
    assert {name: types[name] for name in told} == told
    assert len(set(told.values())) > 1
    assert json.loads((made.out / "measured.json").read_text())["kl"] == made.told["kl"]
    assert not made.out.with_name("small.work").exists()


def test_the_choice_is_no_worse_than_the_plain_plan(made: Made) -> None:
    _, uniform, chosen = made.told["rows"]
    assert 0 < chosen["quality"]["kl"] <= uniform["quality"]["kl"]
    fitting = [t["kl"] for t in made.told["tried"] if t["accounted_bytes"] <= BUDGET]
    assert min(fitting) == made.told["kl"]


def test_llama_cpp_computes_what_was_judged(made: Made) -> None:
    """Loss and greedy text of the file in llama.cpp beside the source in its types in transformers."""
    view = open_checkpoint(made.source)
    tokenizer = AutoTokenizer.from_pretrained(made.source)
    ids = tokenizer(TEXT)["input_ids"][:60]
    types = made.told["settings"]["types"]
    form = GgufForm(made.request, view)
    at = {
        unit.name: unit.at(PALETTE.names.index(types[unit.name]))
        for unit in form.units
        if types[unit.name] != "bf16"
    }
    import gguf

    reader = {t.name: t for t in gguf.GGUFReader(made.out / "small.gguf").tensors}

    def decoded(tensor: Any, number: int) -> torch.Tensor:
        there = reader[tensor.name]
        values = torch.from_numpy(gguf.quants.dequantize(there.data, there.tensor_type).copy())
        return (
            values.reshape(tensor.shape)[number] if len(tensor.pieces) > 1 else values.reshape(tensor.shape)
        )

    from mixtura.fitting.forms.gguf.stream import changed_stream

    streamed = changed_stream(
        view, [(u, at[u.name]) for u in form.units if u.name in at], decoded, torch.float32
    )
    losses: list[float] = []

    def on_logits(logits: torch.Tensor, positions: torch.Tensor) -> None:
        targets = torch.tensor(ids[1:])
        losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")))

    streamed.run(torch.tensor([ids]), on_logits=on_logits)
    found = run_llama(made.out / "small.gguf", 64, sequences=[ids]).losses[0]
    assert math.exp(found / 59) == pytest.approx(math.exp(losses[0] / 59), rel=0.02)


def test_the_report_shows_every_tensor_and_the_commands(made: Made) -> None:
    page = (made.out / "report.html").read_text()
    assert "What happened to every tensor" in page
    assert "ffn_down_exps" in page
    assert "llama.cpp" in made.told["commands"]


def test_a_fit_that_was_stopped_ends_in_the_same_bytes(made: Made, tmp_path: Path) -> None:
    request = request_for(made.source, tmp_path / "small")

    def stop_at(word: str) -> Callable[[str], None]:
        def notify(text: str) -> None:
            if word in text:
                raise KeyboardInterrupt

        return notify

    for word in ("pricing types", "mixed", "writing the model", "generating with"):
        with pytest.raises(KeyboardInterrupt):
            fit(request, stop_at(word))
        assert not request.out.exists()
    again = fit(request)
    first, second = (place / "small.gguf" for place in (made.out, request.out))
    assert first.read_bytes() == second.read_bytes()
    assert again.to_dict()["kl"] == made.told["kl"]
