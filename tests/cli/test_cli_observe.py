"""`mixtura observe`: tables, JSON, a trace file and a page; in memory and streamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import tiny_model
from report_pages import assert_self_contained
from tiny_checkpoints import run_mixtura, save_tiny, tiny_tokenizer

from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.data import text as data_text
from mixtura.data.tokens import encode_documents
from mixtura.errors import CheckpointError
from mixtura.running.observing import observe
from mixtura.running.observing.checkpoint import load_tokenizer, observe_checkpoint, read_text
from mixtura.types.trace import Trace

WORDS = "the quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "deepseek_v3")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "animals.txt").write_text(WORDS)
    (folder / "numbers.jsonl").write_text(json.dumps({"text": "1 + 2 = 3, " * 40, "domain": "numbers"}))
    return folder


@pytest.mark.slow
def test_tables_trace_and_page(model: Path, texts: Path, tmp_path: Path) -> None:
    arguments = ["--text", str(texts), "--tokens", "600", "--statistics", "output_norm"]
    files = ["--save", str(tmp_path / "trace.safetensors"), "--report", str(tmp_path / "page.html")]
    result = run_mixtura("observe", str(model), *arguments, *files)
    assert result.returncode == 0, result.stderr
    for expected in ("By layer", "By domain", "busiest", "never chosen", "numbers", "tiny: "):
        assert expected in result.stdout
    trace = Trace.load(tmp_path / "trace.safetensors")
    assert trace.source_digest == checkpoint_digest(model)
    assert sum(trace.num_tokens) <= 600
    assert set(trace.layers[0].statistics) == {"output_norm"}
    html = (tmp_path / "page.html").read_text()
    assert_self_contained(html)
    assert "What the experts of tiny do" in html


@pytest.mark.slow
def test_json_is_one_object_and_nothing_else(model: Path, texts: Path) -> None:
    result = run_mixtura("observe", str(model), "--text", str(texts), "--tokens", "300", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["model"] == "tiny"
    assert values["tokens"] == sum(domain["tokens"] for domain in values["domains"])
    for layer in values["layers"]:
        assert sum(sum(row) for row in layer["counts"].values()) == values["tokens"] * layer["top_k"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--statistics", "output_nrom"], "did you mean 'output_norm'"),
        (["--report", "/nowhere/page.html"], "there is no directory /nowhere"),
        (["--save", "."], "is a directory"),
        (["--text", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--memory", "1GiB"], "--memory is for analyses that run the model again"),
        (["--memory", "lots", "--analysis", "batch_leak"], "lots"),
    ],
)
def test_wrong_arguments_end_with_one_sentence(model: Path, arguments: list[str], message: str) -> None:
    result = run_mixtura("observe", str(model), "--tokens", "64", *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.slow
def test_analyses_in_little_memory_say_what_they_say_in_much(model: Path, texts: Path) -> None:
    asked = ["observe", str(model), "--text", str(texts), "--tokens", "300", "--length", "32", "--json"]
    asked += ["--analysis", "expert_similarity,compute_oracle,batch_leak"]
    plain, small = (run_mixtura(*asked, *more) for more in ((), ("--memory", "800MiB")))
    assert plain.returncode == small.returncode == 0, plain.stderr + small.stderr
    found = json.loads(small.stdout)
    assert set(found["analyses"]) == {"expert_similarity", "compute_oracle", "batch_leak"}
    assert found["analyses"] == json.loads(plain.stdout)["analyses"]


def test_model_without_tokenizer_is_named(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_streaming_sees_what_loading_sees_and_what_transformers_sees(model: Path) -> None:
    view = open_checkpoint(model)
    tokens = read_text(view, None, max_tokens=400, max_length=48)
    names = ["weighted_output_norm"]
    streamed = observe_checkpoint(view, tokens, statistics=names, stream=True)
    loaded = observe_checkpoint(view, tokens, statistics=names, stream=False)
    memory = observe(tiny_model("deepseek_v3"), tokens, statistics=names)
    by_path = observe(model, tokens, statistics=names)
    for other in (streamed, loaded, by_path):
        assert other.source_digest == checkpoint_digest(model)
        for one, two in zip(memory.layers, other.layers, strict=True):
            assert torch.equal(one.counts, two.counts)
            assert torch.equal(one.coactivation, two.coactivation)
            assert one.expert_num_bytes == two.expert_num_bytes
            torch.testing.assert_close(
                one.statistics[names[0]], two.statistics[names[0]], rtol=1e-4, atol=1e-6
            )


def test_sequences_are_no_longer_than_the_models_positions(model: Path) -> None:
    tokens = read_text(open_checkpoint(model), None, max_tokens=400, max_length=512)
    assert tokens.input_ids.shape[1] == 64
    documents = data_text.calibration(8 * 400)
    assert tokens.domain_names == encode_documents(documents, tiny_tokenizer()).domain_names
