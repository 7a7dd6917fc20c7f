"""GGUF files as the package gguf reads them: every tensor's values, what is said of the model, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_sources import CONFIGS, byte_tokenizer, save_source
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.gguf.libraries import encode, llama_library
from mixtura.checkpoints.gguf.types import NAMES, TypeRules, fitting_type, storage_type
from mixtura.checkpoints.matrices import packable_matrices
from mixtura.checkpoints.skeleton import build, open_checkpoint
from mixtura.errors import CheckpointError, OutputError, UnknownNameError, UnsupportedModelError, UserError
from mixtura.running.gguf import GgufExport, export_gguf
from mixtura.types import Drop, Plan, Quantize, QuantizeMatrix

gguf: Any = pytest.importorskip("gguf", reason="the package gguf is not installed; it is in mixtura[gguf]")
SIMPLE = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """Settings, tensors as numbers, and the tensors' types."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors, types = {}, {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
        types[tensor.name] = tensor.tensor_type.name.lower()
    return fields, tensors, types


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("gguf") / "model", "qwen3_moe")


@pytest.mark.parametrize("family", CONFIGS)
def test_every_weight_is_there_once(family: str, tmp_path: Path) -> None:
    path = save_source(tmp_path / "model", family)
    export_gguf(path, tmp_path / "model.gguf")
    _, tensors, _ = read(tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    state = {tensor.data_ptr(): tensor for tensor in model.state_dict(keep_vars=True).values()}
    wanted = [tensor.detach().flatten() for tensor in state.values()]
    if family == "olmoe tied":
        wanted.append(model.lm_head.weight.detach().flatten())
    found = torch.cat([tensor.flatten() for tensor in tensors.values()]).sort().values
    assert torch.equal(found, torch.cat(wanted).sort().values)


def test_a_plan_that_was_applied_is_exported_as_it_runs(source: Path, tmp_path: Path) -> None:
    view = open_checkpoint(source)
    layer = view.layers[0]
    actions = (
        Drop(layer.index, (1,)),
        Drop(view.layers[1].index, (0,)),
        *(Quantize(layer.index, e, "trellis", {"bits": 3}) for e in range(layer.num_experts) if e != 1),
        *(QuantizeMatrix(n, "round_to_nearest", {"bits": 8}) for n in packable_matrices(build(view), view)),
    )
    plan = Plan(checkpoint_digest(source), actions)
    packed = apply_plan(plan, source, tmp_path / "packed", progress=False)
    export_gguf(packed, tmp_path / "model.gguf", ["f32"])
    _, tensors, _ = read(tmp_path / "model.gguf")
    made = open_checkpoint(packed)
    for name, own in {"output": "lm_head", "blk.0.attn_q": "model.layers.0.self_attn.q_proj"}.items():
        assert torch.equal(tensors[f"{name}.weight"], made.parameter(f"{own}.weight").float())
    for number in (0, 1):
        experts = [made.layers[number].native_expert(e) for e in range(made.layers[number].num_experts)]
        assert torch.equal(
            tensors[f"blk.{number}.ffn_down_exps.weight"], torch.stack([e.down for e in experts]).float()
        )
        half = experts[0].up.shape[0] // 2
        assert torch.equal(
            tensors[f"blk.{number}.ffn_gate_exps.weight"], torch.stack([e.up[:half] for e in experts]).float()
        )


def test_tensors_lie_where_llama_cpp_looks(source: Path, tmp_path: Path) -> None:
    export_gguf(source, tmp_path / "model.gguf")
    _, tensors, _ = read(tmp_path / "model.gguf")
    state = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    there = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.attn_q": "model.layers.1.self_attn.q_proj",
        "blk.1.attn_k_norm": "model.layers.1.self_attn.k_norm",
        "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
        "blk.1.ffn_gate_inp": "model.layers.1.mlp.gate",
    }
    for name, own in there.items():
        assert torch.equal(tensors[f"{name}.weight"], state[f"{own}.weight"]), name
    both = state["model.layers.1.mlp.experts.gate_up_proj"]
    half = both.shape[1] // 2
    assert torch.equal(tensors["blk.1.ffn_gate_exps.weight"], both[:, :half])
    assert torch.equal(tensors["blk.1.ffn_up_exps.weight"], both[:, half:])
    assert torch.equal(tensors["blk.1.ffn_down_exps.weight"], state["model.layers.1.mlp.experts.down_proj"])


def test_rows_of_heads_are_in_pairs_where_llama_cpp_turns_pairs(tmp_path: Path) -> None:
    path = save_source(tmp_path / "model", "mixtral")
    export_gguf(path, tmp_path / "model.gguf")
    _, tensors, _ = read(tmp_path / "model.gguf")
    state = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    weight, found = state["model.layers.0.self_attn.q_proj.weight"], tensors["blk.0.attn_q.weight"]
    width = 16
    for head in range(4):
        for pair in range(width // 2):
            for half in range(2):
                row = head * width + 2 * pair + half
                assert torch.equal(found[row], weight[head * width + half * width // 2 + pair])


def test_what_is_said_of_the_model(source: Path, tmp_path: Path) -> None:
    export_gguf(source, tmp_path / "model.gguf")
    fields, _, _ = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == "qwen3moe"
    assert fields["general.name"] == "model"
    assert fields["qwen3moe.expert_count"] == 8
    assert fields["qwen3moe.expert_used_count"] == 2
    assert fields["qwen3moe.expert_feed_forward_length"] == 64
    assert fields["qwen3moe.attention.key_length"] == 32
    assert fields["qwen3moe.attention.head_count_kv"] == 2
    assert fields["qwen3moe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert fields["tokenizer.ggml.add_bos_token"]
    assert not fields["tokenizer.ggml.add_eos_token"]
    assert "m['content']" in fields["tokenizer.chat_template"]


def test_the_tokenizer_is_all_there(source: Path, tmp_path: Path) -> None:
    export_gguf(source, tmp_path / "model.gguf")
    fields, _, _ = read(tmp_path / "model.gguf")
    stated = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert all(tokens[number] == token for token, number in stated["model"]["vocab"].items())
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in stated["model"]["merges"]]
    assert len(tokens) == len(kinds) == 320
    assert kinds[0] == 3
    assert kinds[tokens.index("<fox>")] == 4
    assert kinds[-1] == 5


@pytest.mark.parametrize("kind", SIMPLE)
def test_values_are_as_near_as_the_type_allows(kind: str, source: Path, tmp_path: Path) -> None:
    export_gguf(source, tmp_path / "plain.gguf")
    export_gguf(source, tmp_path / "model.gguf", [f"*={kind}"], calibrate=False)
    _, wanted, _ = read(tmp_path / "plain.gguf")
    _, found, types = read(tmp_path / "model.gguf")
    steps = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.01, "q5_1": 0.06, "q5_0": 0.07}
    for name, values in wanted.items():
        if values.ndim == 1 or "gate_inp" in name:
            assert types[name] == "f32"
            assert torch.equal(found[name], values)
            continue
        assert types[name] == kind
        error = float((found[name] - values).norm() / values.norm())
        assert error <= steps.get(kind, 0.12), name
        assert kind == "f32" or error > 0


def test_the_last_rule_for_a_tensor_counts(source: Path, tmp_path: Path) -> None:
    rules = ["q8_0", "experts=q4_0", "blk.1.ffn_down_exps=q5_0", "blk.*.attn_?=f16"]
    export_gguf(source, tmp_path / "model.gguf", rules, calibrate=False)
    _, _, types = read(tmp_path / "model.gguf")
    assert types["blk.0.ffn_down_exps.weight"] == "q4_0"
    assert types["blk.1.ffn_down_exps.weight"] == "q5_0"
    assert types["blk.1.ffn_up_exps.weight"] == "q4_0"
    assert types["blk.0.attn_q.weight"] == "f16"
    assert types["blk.0.attn_output.weight"] == "q8_0"
    assert types["token_embd.weight"] == types["output.weight"] == "q8_0"


def test_embedding_and_head_keep_eight_bits_unless_they_are_named() -> None:
    assert TypeRules(["q4_0"]).wanted("output") == "q8_0"
    assert TypeRules(["bf16"]).wanted("output") == "bf16"
    assert TypeRules(["*=q4_0"]).wanted("token_embd") == "q4_0"
    assert TypeRules(["head=q4_0", "q5_0"]).wanted("output") == "q8_0"
    assert TypeRules(["experts=q4_0"]).wanted("output") is None


def test_rows_that_are_no_whole_blocks_get_another_type(source: Path) -> None:
    assert fitting_type("q4_k", 512).name == "q4_k"
    assert fitting_type("q4_k", 128).name == "q5_0"
    assert fitting_type("iq2_xs", 96).name == "iq4_nl"
    assert fitting_type("q4_k", 100).name == "f16"
    planned = GgufExport(source, ["experts=q8_0"]).planned
    assert not planned.gave_way


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("q9_k", "did you mean"),
        ("experts=", "no type of GGUF files named ''"),
        ("=q8_0", "names no tensors"),
        ("blk.*.ffn_gate_inp=q8_0", "llama.cpp has in f32"),
        ("blk.7.ffn_up_exps=q8_0", "no tensor of this model"),
        ("shared=q8_0", "no tensor of this model"),
    ],
)
def test_rules_that_are_for_nothing_are_refused(rule: str, said: str, source: Path) -> None:
    with pytest.raises(UserError, match=said):
        GgufExport(source, [rule])


def test_types_of_llama_cpps_own_library_say_what_to_install(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    llama_library.cache_clear()
    try:
        with pytest.raises(UserError, match=r"mixtura\[llama\]"):
            GgufExport(source, ["experts=iq4_nl"])
    finally:
        llama_library.cache_clear()


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "sum to one"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "silu"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("mixtral", {"sliding_window": 16}, "sliding_window"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "groups"),
        ("deepseek_v3", {"rope_interleave": False}, "pairs"),
        ("qwen2_moe", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    family: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = save_source(tmp_path / "model", family)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=said):
        GgufExport(path)


def test_other_families_are_refused_with_those_that_can_be_written(tmp_path: Path) -> None:
    from tiny_checkpoints import save_tiny

    with pytest.raises(UnsupportedModelError, match=r"dots1.*qwen3_moe, .*mixtral"):
        GgufExport(save_tiny(tmp_path / "model", "dots1"))


def with_tokenizer(source: Path, tmp_path: Path, backend: Tokenizer) -> Path:
    path = tmp_path / "model"
    shutil.copytree(source, path)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    return path


def test_tokenizers_that_llama_cpp_has_not_are_refused(source: Path, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UnsupportedModelError, match="only BPE"):
        GgufExport(with_tokenizer(source, tmp_path / "words", words))
    other = byte_tokenizer("gpt-2").backend_tokenizer
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnsupportedModelError, match="Whitespace"):
        GgufExport(with_tokenizer(source, tmp_path / "splits", other))


def test_a_missing_or_damaged_tokenizer_is_said(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(source, path)
    (path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged"):
        GgufExport(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="save the tokenizer again"):
        GgufExport(path)


def test_tokens_without_an_embedding_are_refused(source: Path, tmp_path: Path) -> None:
    backend = byte_tokenizer("smollm").backend_tokenizer
    backend.add_tokens([f"<more {number}>" for number in range(20)])
    with pytest.raises(UnsupportedModelError, match="320 embeddings"):
        GgufExport(with_tokenizer(source, tmp_path, backend))


def test_an_existing_file_stays_as_it_is(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="never overwritten"):
        export_gguf(source, out)
    assert out.read_text(encoding="utf-8") == "mine"
    with pytest.raises(OutputError, match="no directory"):
        export_gguf(source, tmp_path / "nowhere" / "model.gguf")


def test_nothing_is_left_of_a_file_that_was_stopped(source: Path, tmp_path: Path) -> None:
    def stop(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GgufExport(source).write(tmp_path / "model.gguf", None, stop)
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, signal, sys
from mixtura.errors import OutputError
from mixtura.running.gguf import export_gguf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    export_gguf(sys.argv[1], sys.argv[2])
except OutputError as error:
    print(error)
"""


def test_a_disk_that_fills_up_is_a_sentence_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="the system has no limits of file sizes")
    out = tmp_path / "model.gguf"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(source), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "make room" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_said_and_leave_nothing(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model"
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 3] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_q"):
        export_gguf(path, tmp_path / "model.gguf")
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_no_more_than_a_matrix_is_read_at_a_time(source: Path) -> None:
    export = GgufExport(source)
    for tensor in export.planned.tensors:
        if "_exps" in tensor.name:
            assert all(piece.read().ndim == 2 for piece in tensor.pieces)
            assert len(tensor.pieces) == tensor.shape[0]


@pytest.mark.skipif(llama_library() is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("f32", "f16", "bf16")])
def test_importance_moves_the_error_to_where_it_counts_less(name: str) -> None:
    library = llama_library()
    assert library is not None
    kind = storage_type(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator)
    importance = torch.where(torch.arange(512) % 4 == 0, 100.0, 1.0)
    errors = []
    for given in (importance, torch.ones(512)):
        values = library.decode(encode(weight, kind, given), kind, 64, 512)
        errors.append(float(((values - weight).square() * importance).sum()))
    assert errors[0] <= errors[1] * 1.001


def test_a_type_that_does_not_exist_is_named() -> None:
    with pytest.raises(UnknownNameError, match="q4_k"):
        storage_type("q4k")
